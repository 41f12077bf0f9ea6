//! The report: a table for people, in Markdown, and every mismatch with what is needed to look into it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, EncodingKind, Formatter, GasFormatter};

use crate::campaign::{Campaign, Mismatch, Tally, Verdict};
use probe_core::Vendor;

/// What became of a form, over all its cases at one CPL. In this order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FormVerdict {
    /// At least one case differs.
    Mismatch,
    /// Some cases ran and all agree.
    Equal,
    /// All cases agree on #UD.
    Invalid,
    /// The engine refuses every case, before or at the hit.
    Refused,
    /// No case can be compared on this host.
    NotComparable,
    /// KVM's emulator runs none of the cases.
    NotEmulatedByKvm,
    /// Probes at CPL 3 do not stop on this host.
    NoUserBreakpoints,
}

impl FormVerdict {
    /// Every verdict with its heading.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::Equal, "equal"),
        (Self::Mismatch, "mismatch"),
        (Self::Refused, "refused"),
        (Self::Invalid, "#UD in both"),
        (Self::NotComparable, "not comparable"),
        (Self::NotEmulatedByKvm, "not in KVM's emulator"),
        (Self::NoUserBreakpoints, "no exit at CPL 3"),
    ];

    /// The verdict on a form; `None` without cases.
    #[must_use]
    pub fn of(tally: &Tally) -> Option<Self> {
        tally
            .keys()
            .map(|verdict| match verdict {
                Verdict::Mismatch => Self::Mismatch,
                Verdict::Equal => Self::Equal,
                Verdict::EqualInvalid => Self::Invalid,
                Verdict::NotComparable(_) => Self::NotComparable,
                Verdict::Refused(_) | Verdict::Withdrawn(_) => Self::Refused,
                Verdict::NotEmulatedByKvm => Self::NotEmulatedByKvm,
                Verdict::NoUserBreakpoints => Self::NoUserBreakpoints,
            })
            .min()
    }
}

/// The whole report.
#[must_use]
pub fn markdown(campaign: &Campaign) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = write_report(campaign, &mut text);
    text
}

fn write_report(campaign: &Campaign, out: &mut String) -> std::fmt::Result {
    let host = campaign.host;
    let vendor = match campaign.vendor {
        Vendor::Amd => "AMD",
        Vendor::Intel => "Intel",
        Vendor::Unknown => "unknown",
    };
    writeln!(out, "# Every instruction form, bare and probed\n")?;
    writeln!(
        out,
        "Seed {}. The guest's CPU decodes as {vendor}; CPL 0 code runs {}; the vector state goes through {}.\n",
        campaign.seed(),
        if host.emulates_kernel { "in KVM's instruction emulator" } else { "on the CPU" },
        if host.xsave { "XSAVE" } else { "FXSAVE" },
    )?;
    forms_table(campaign, out)?;
    cases_table(campaign, out)?;
    reasons(campaign, "refusals", out, |verdict| match verdict {
        Verdict::Refused(reason) | Verdict::Withdrawn(reason) => Some(reason),
        _ => None,
    })?;
    reasons(campaign, "cases that cannot be compared on this host", out, |verdict| match verdict {
        Verdict::NotComparable(reason) => Some(reason),
        _ => None,
    })?;
    missing(campaign, out)?;
    left_out(campaign, out)?;
    mismatches(&campaign.mismatches, out)
}

fn forms_table(campaign: &Campaign, out: &mut String) -> std::fmt::Result {
    writeln!(out, "## Forms\n")?;
    let headings: Vec<&str> = FormVerdict::ALL.iter().map(|(_, heading)| *heading).collect();
    writeln!(out, "| encoding | CPL | forms | {} |", headings.join(" | "))?;
    writeln!(out, "|---|---|---|{}", "---|".repeat(headings.len()))?;
    for encoding in EncodingKind::values() {
        for (index, cpl) in [(0, 0), (1, 3)] {
            let of_kind = campaign.tallies.iter().filter(|(code, _)| code.op_code().encoding() == encoding);
            let mut counts: BTreeMap<FormVerdict, u32> = BTreeMap::new();
            for verdict in of_kind.filter_map(|(_, tallies)| FormVerdict::of(&tallies[index])) {
                *counts.entry(verdict).or_default() += 1;
            }
            let total: u32 = counts.values().sum();
            if total > 0 {
                let cells: Vec<String> = FormVerdict::ALL
                    .iter()
                    .map(|(verdict, _)| counts.get(verdict).copied().unwrap_or_default().to_string())
                    .collect();
                writeln!(out, "| {encoding:?} | {cpl} | {total} | {} |", cells.join(" | "))?;
            }
        }
    }
    writeln!(
        out,
        "\nA form is equal if at least one of its cases ran in both ways and none differs; its other cases may have been \
         refused.\n"
    )
}

fn cases_table(campaign: &Campaign, out: &mut String) -> std::fmt::Result {
    let mut totals: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    for tallies in campaign.tallies.values() {
        for (index, tally) in tallies.iter().enumerate() {
            for (verdict, count) in tally {
                let name = match verdict {
                    Verdict::Equal => "equal",
                    Verdict::EqualInvalid => "equal: #UD in both",
                    Verdict::NotComparable(_) => "not comparable on this host",
                    Verdict::Refused(_) => "refused when the probe is armed",
                    Verdict::Withdrawn(_) => "refused at the hit: the probe was taken out",
                    Verdict::NotEmulatedByKvm => "not run: not in KVM's emulator",
                    Verdict::NoUserBreakpoints => "not run: CPL 3 probes do not exit on this host",
                    Verdict::Mismatch => "mismatch",
                };
                totals.entry(name).or_default()[index] += count;
            }
        }
    }
    writeln!(out, "## Cases\n\n| outcome | CPL 0 | CPL 3 |\n|---|---|---|")?;
    for (name, [kernel, user]) in totals {
        writeln!(out, "| {name} | {kernel} | {user} |")?;
    }
    writeln!(out)
}

fn reasons(
    campaign: &Campaign,
    of: &str,
    out: &mut String,
    reason: impl Fn(&Verdict) -> Option<&str>,
) -> std::fmt::Result {
    let mut reasons: BTreeMap<&str, (u64, Vec<Code>)> = BTreeMap::new();
    for (code, tallies) in &campaign.tallies {
        for (verdict, count) in tallies.iter().flatten() {
            if let Some(reason) = reason(verdict) {
                let (cases, forms) = reasons.entry(reason).or_default();
                *cases += count;
                if forms.last() != Some(code) {
                    forms.push(*code);
                }
            }
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    writeln!(out, "## Reasons of {of}\n\n| reason | forms | cases | for example |\n|---|---|---|---|")?;
    for (reason, (cases, forms)) in reasons {
        let some: Vec<String> = forms.iter().take(4).map(|code| format!("{code:?}")).collect();
        writeln!(out, "| {reason} | {} | {cases} | {} |", forms.len(), some.join(", "))?;
    }
    writeln!(out)
}

/// Forms that raise #UD in both ways, by the extensions that they need.
fn missing(campaign: &Campaign, out: &mut String) -> std::fmt::Result {
    let mut extensions: BTreeMap<String, u32> = BTreeMap::new();
    for (code, tallies) in &campaign.tallies {
        let verdicts: Vec<FormVerdict> = tallies.iter().filter_map(FormVerdict::of).collect();
        if verdicts.contains(&FormVerdict::Invalid) && !verdicts.contains(&FormVerdict::Equal) {
            let needed: Vec<String> =
                code.cpuid_features().iter().map(|feature| format!("{feature:?}")).collect();
            *extensions.entry(needed.join(" and ")).or_default() += 1;
        }
    }
    if extensions.is_empty() {
        return Ok(());
    }
    writeln!(out, "## What the guest's CPU lacks: forms that raise #UD in both ways\n")?;
    writeln!(out, "| extension | forms |\n|---|---|")?;
    for (extension, forms) in extensions {
        writeln!(out, "| {extension} | {forms} |")?;
    }
    writeln!(out)
}

fn left_out(campaign: &Campaign, out: &mut String) -> std::fmt::Result {
    writeln!(out, "## Forms that do not run\n\n| reason | forms |\n|---|---|")?;
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for reason in campaign.excluded.values() {
        *counts.entry(reason.to_string()).or_default() += 1;
    }
    let others = u32::try_from(campaign.other_vendor.len()).unwrap_or(u32::MAX);
    if others > 0 {
        counts.insert("this vendor's CPUs decode the bytes differently".to_owned(), others);
    }
    for (reason, count) in counts {
        writeln!(out, "| {reason} | {count} |")?;
    }
    writeln!(out)
}

/// How many mismatches of one form are written out.
const SHOWN_PER_FORM: usize = 3;

fn mismatches(mismatches: &[Mismatch], out: &mut String) -> std::fmt::Result {
    writeln!(out, "## Mismatches\n")?;
    if mismatches.is_empty() {
        return writeln!(out, "None.");
    }
    let mut shown: BTreeMap<Code, usize> = BTreeMap::new();
    for mismatch in mismatches {
        let shown = shown.entry(mismatch.case.code).or_default();
        *shown += 1;
        if *shown <= SHOWN_PER_FORM {
            one_mismatch(mismatch, out)?;
        }
    }
    writeln!(out, "| form | mismatches |\n|---|---|")?;
    for (code, count) in shown {
        writeln!(out, "| {code:?} | {count} |")?;
    }
    Ok(())
}

fn one_mismatch(mismatch: &Mismatch, out: &mut String) -> std::fmt::Result {
    const LINES: usize = 12;
    let case = &mismatch.case;
    let bytes: Vec<String> = case.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut text = String::new();
    GasFormatter::new().format(&case.instruction, &mut text);
    writeln!(out, "### {:?} at CPL {}\n\n```", case.code, case.cpl)?;
    writeln!(out, "{:#x}: {}   {text}", case.site, bytes.join(" "))?;
    writeln!(
        out,
        "before: {} fs={:#x} gs={:#x}",
        crate::outcome::describe(&case.regs),
        case.fs_base,
        case.gs_base
    )?;
    writeln!(out, "bare:   {}\nprobed: {}", mismatch.bare, mismatch.probed)?;
    for difference in mismatch.differences.iter().take(LINES) {
        writeln!(out, "  {difference}")?;
    }
    if mismatch.differences.len() > LINES {
        writeln!(out, "  and {} more", mismatch.differences.len() - LINES)?;
    }
    writeln!(out, "```\n")
}
