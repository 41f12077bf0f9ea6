//! Boot menu entries: UAPI.1, "Boot Loader Specification", and the order of its section "Sorting".

use std::cmp::Ordering;

use uapi_version::strverscmp;

use crate::image::extras::os_release;
use crate::image::uki::Uki;

/// What an entry starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Type 1: a kernel, and its initial RAM disks, by their paths.
    Linux { linux: String, initrds: Vec<String>, options: String },
    /// Type 2, or a type 1 entry that names one: a unified kernel image by its path, and the words that go behind its own.
    Uki { path: String, options: String },
}

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without its suffix and without the counts of tries.
    pub id: String,
    pub title: Option<String>,
    pub version: Option<String>,
    pub machine_id: Option<String>,
    pub sort_key: Option<String>,
    /// All tries of booting it are used up.
    pub bad: bool,
    pub payload: Payload,
}

/// Parts a name into the identifier and whether its tries are used up: "NAME+LEFT-DONE.SUFFIX" (section "Boot counting").
fn parts<'a>(file: &'a str, suffix: &str) -> Option<(&'a str, bool)> {
    let stem = file.strip_suffix(suffix)?;
    let Some((id, counts)) = stem.rsplit_once('+') else { return Some((stem, false)) };
    let (left, done) = counts.split_once('-').unwrap_or((counts, "0"));
    match (left.parse::<u32>(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => Some((id, left == 0)),
        _ => Some((stem, false)),
    }
}

/// The words of a value. One that begins with `$` is a variable of GRUB's, whose value is in no entry.
fn words(value: &str) -> impl Iterator<Item = String> {
    value.split_ascii_whitespace().filter(|word| !word.starts_with('$')).map(str::to_owned)
}

impl Entry {
    /// A type 1 entry: the file's name and its text. `None` if it is for another architecture or names nothing that can be booted.
    pub fn parse(file: &str, text: &str) -> Option<Self> {
        let (id, bad) = parts(file, ".conf")?;
        let (mut title, mut version, mut machine_id, mut sort_key) = (None, None, None, None);
        let (mut linux, mut uki, mut initrds, mut options) = (None, None, Vec::new(), Vec::new());
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once([' ', '\t']) else { continue };
            let value = value.trim().to_owned();
            match key {
                "title" => title = Some(value),
                "version" => version = Some(value),
                "machine-id" => machine_id = Some(value),
                "sort-key" => sort_key = Some(value),
                "linux" => linux = Some(value),
                "efi" | "uki" => uki = Some(value),
                // Entries for GRUB name several on a line.
                "initrd" => initrds.extend(words(&value)),
                "options" => options.extend(words(&value)),
                "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
                _ => {}
            }
        }
        let options = options.join(" ");
        let payload = match (linux, uki) {
            (Some(linux), _) => Payload::Linux { linux, initrds, options },
            (None, Some(path)) => Payload::Uki { path, options },
            (None, None) => return None,
        };
        Some(Self { id: id.to_owned(), title, version, machine_id, sort_key, bad, payload })
    }

    /// A type 2 entry: the file's name, its path and what it says of itself.
    pub fn of_uki(file: &str, path: &str, uki: &Uki<'_>) -> Option<Self> {
        let (id, bad) = parts(file, ".efi")?;
        let field = |names: &[&str]| names.iter().find_map(|name| os_release(uki.os_release?, name));
        Some(Self {
            id: id.to_owned(),
            title: field(&["PRETTY_NAME", "NAME"]),
            version: field(&["IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID"]),
            machine_id: None,
            sort_key: field(&["IMAGE_ID", "ID"]),
            bad,
            payload: Payload::Uki { path: path.to_owned(), options: String::new() },
        })
    }

    /// The order of a menu: the first is booted.
    pub fn order(&self, other: &Self) -> Ordering {
        let version = |entry: &Self| entry.version.clone().unwrap_or_default();
        let by_keys = match (&self.sort_key, &other.sort_key) {
            (Some(mine), Some(theirs)) => mine
                .cmp(theirs)
                .then_with(|| self.machine_id.cmp(&other.machine_id))
                .then_with(|| strverscmp(&version(other), &version(self))),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        };
        self.bad.cmp(&other.bad).then(by_keys).then_with(|| strverscmp(&other.id, &self.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(file: &str, text: &str) -> Entry {
        Entry::parse(file, text).expect("an entry")
    }

    fn sorted(entries: &[(&str, &str)]) -> Vec<String> {
        let mut entries: Vec<Entry> = entries.iter().map(|(file, text)| entry(file, text)).collect();
        entries.sort_by(Entry::order);
        entries.into_iter().map(|entry| entry.id).collect()
    }

    #[test]
    fn the_fields_of_an_entry_are_read() {
        let text = "# comment\ntitle  Debian 12\nversion\t6.1.0-56\nsort-key debian\nlinux /6.1/linux\ninitrd /6.1/a\n\
                    initrd /6.1/b $tuned_initrd\noptions root=UUID=x ro\noptions $kernelopts quiet\nfuture thing\n";
        let entry = entry("debian+3-1.conf", text);
        assert_eq!((entry.id.as_str(), entry.bad), ("debian", false));
        assert_eq!((entry.title.as_deref(), entry.version.as_deref()), (Some("Debian 12"), Some("6.1.0-56")));
        let Payload::Linux { linux, initrds, options } = entry.payload else { panic!("a kernel") };
        assert_eq!((linux.as_str(), options.as_str()), ("/6.1/linux", "root=UUID=x ro quiet"));
        assert_eq!(initrds, ["/6.1/a", "/6.1/b"]);
    }

    #[test]
    fn what_cannot_be_booted_here_is_no_entry() {
        for (file, text) in [
            ("a.conf", "title nothing"),
            ("a.conf", "linux /l\narchitecture aa64"),
            ("a.txt", "linux /l"),
            ("a.conf", ""),
        ] {
            assert_eq!(Entry::parse(file, text), None, "{file}: {text}");
        }
        assert!(Entry::parse("a.conf", "linux /l\narchitecture X64").is_some());
    }

    #[test]
    fn the_newest_comes_first() {
        const OLD: &str = "linux /l\nsort-key debian\nversion 6.1.9";
        const NEW: &str = "linux /l\nsort-key debian\nversion 6.1.10";
        assert_eq!(sorted(&[("z-old.conf", OLD), ("a-new.conf", NEW)]), ["a-new", "z-old"]);
        assert_eq!(
            sorted(&[("a-new+0-3.conf", NEW), ("z-old.conf", OLD)]),
            ["z-old", "a-new"],
            "no tries left"
        );
        assert_eq!(
            sorted(&[("x-6.1.9.conf", "linux /l"), ("x-6.1.10.conf", "linux /l")]),
            ["x-6.1.10", "x-6.1.9"]
        );
        assert_eq!(
            sorted(&[("zzz.conf", "linux /l"), ("a.conf", OLD)]),
            ["a", "zzz"],
            "a sort-key goes first"
        );
        let other = "linux /l\nsort-key arch\nversion 1";
        assert_eq!(sorted(&[("n.conf", NEW), ("o.conf", other)]), ["o", "n"]);
    }
}
