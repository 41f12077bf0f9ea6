//! The machine's own package sources, read by an apt of our own that needs no root and changes nothing on the system.
//!
//! Formats: sources.list(5), apt.conf(5).

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::OsRelease;

/// Where apt keeps the machine's sources.
const SYSTEM_SOURCES: &str = "/etc/apt";

/// Where our own sources are, one file in each of apt's formats.
const SOURCE_FILES: [&str; 2] = ["sources.list.d/own.list", "sources.list.d/own.sources"];

/// Sources that serve the distribution itself, for binary and source packages alike, in both of apt's formats.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sources {
    /// One-line format, a `.list` file.
    list: String,
    /// deb822 format, a `.sources` file.
    deb822: String,
}

impl Sources {
    /// Reads the machine's sources files.
    pub(crate) fn of_system(os: &OsRelease) -> io::Result<Self> {
        Self::read(Path::new(SYSTEM_SOURCES), os)
    }

    fn read(etc: &Path, os: &OsRelease) -> io::Result<Self> {
        let mut files = vec![etc.join("sources.list")];
        match fs::read_dir(etc.join("sources.list.d")) {
            Ok(dir) => {
                for entry in dir {
                    files.push(entry?.path());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        files.sort();
        let mut sources = Self::default();
        for file in files {
            let text = match fs::read_to_string(&file) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("list") => sources.add_list(&text, os),
                Some("sources") => sources.add_deb822(&text, os),
                _ => {}
            }
        }
        Ok(sources)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty() && self.deb822.is_empty()
    }

    /// Adds the entries of a one-line format file: `deb [option=value ...] URI SUITE COMPONENT...`.
    fn add_list(&mut self, text: &str, os: &OsRelease) {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let Some((kind, rest)) = line.split_once(char::is_whitespace) else { continue };
            if kind != "deb" && kind != "deb-src" {
                continue;
            }
            let rest = rest.trim_start();
            let (options, entry) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
                Some((options, entry)) => (options, entry),
                None => ("", rest),
            };
            let mut words = entry.split_whitespace();
            let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
            let components: Vec<&str> = words.collect();
            let Some(suite) = os.wanted_suite(suite).filter(|_| components.contains(&"main")) else {
                continue;
            };
            // Sources have no architecture, and of the binaries ours alone is wanted.
            let options: Vec<&str> =
                options.split_whitespace().filter(|option| !option.starts_with("arch")).collect();
            let options =
                if options.is_empty() { String::new() } else { format!("[{}] ", options.join(" ")) };
            for kind in ["deb", "deb-src"] {
                let line = format!("{kind} {options}{uri} {suite} {}\n", components.join(" "));
                if !self.list.contains(&line) {
                    self.list.push_str(&line);
                }
            }
        }
    }

    /// Adds the stanzas of a deb822 format file.
    fn add_deb822(&mut self, text: &str, os: &OsRelease) {
        let text: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        for stanza in text.split(|line| line.trim().is_empty()) {
            let fields = fields(stanza);
            let field = |name: &str| {
                fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
            };
            let words = |name| field(name).unwrap_or_default().split_whitespace();
            let off = field("Enabled").is_some_and(|value| {
                ["no", "false", "without", "off", "disable", "0"].contains(&value.to_lowercase().trim())
            });
            let suites: Vec<String> = words("Suites").filter_map(|suite| os.wanted_suite(suite)).collect();
            let package_source = words("Types").any(|kind| kind == "deb" || kind == "deb-src");
            if off || !package_source || suites.is_empty() || !words("Components").any(|name| name == "main")
            {
                continue;
            }
            let mut stanza = format!("Types: deb deb-src\nSuites: {}\n", suites.join(" "));
            for (key, value) in &fields {
                let replaced = ["Types", "Suites", "Architectures", "Enabled"];
                if !replaced.iter().any(|name| key.eq_ignore_ascii_case(name)) {
                    // A value of several lines (an embedded key) keeps them.
                    let _ = writeln!(stanza, "{key}:{value}");
                }
            }
            stanza.push('\n');
            if !self.deb822.contains(&stanza) {
                self.deb822.push_str(&stanza);
            }
        }
    }
}

/// The fields of a deb822 stanza. A value keeps its continuation lines and the space behind the colon.
fn fields(stanza: &[&str]) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.to_owned()));
        }
    }
    fields
}

/// An apt with its own sources, package lists and downloads, below one directory.
#[derive(Debug)]
pub(crate) struct Apt {
    root: PathBuf,
    config: PathBuf,
    downloads: PathBuf,
}

impl Apt {
    /// Lays the directory `root` out. `root` must be absolute.
    pub(crate) fn new(root: &Path, sources: &Sources) -> io::Result<Self> {
        for dir in ["state/lists/partial", "cache/archives/partial", "sources.list.d", "downloads"] {
            fs::create_dir_all(root.join(dir))?;
        }
        for (name, text) in SOURCE_FILES.iter().zip([&sources.list, &sources.deb822]) {
            fs::write(root.join(name), text)?;
        }
        let config = root.join("apt.conf");
        fs::write(&config, configuration(root))?;
        Ok(Self { root: root.to_owned(), config, downloads: root.join("downloads") })
    }

    /// Its sources, for another program that reads files of apt's formats.
    pub(crate) fn source_files(&self) -> [PathBuf; 2] {
        SOURCE_FILES.map(|name| self.root.join(name))
    }

    /// Where [`Apt::command`]'s downloads go.
    pub(crate) fn downloads(&self) -> &Path {
        &self.downloads
    }

    /// `program` (apt-get, apt-cache) on our own sources, with `arguments`.
    pub(crate) fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).args(arguments).current_dir(&self.downloads);
        // The output is parsed.
        command.env("LC_ALL", "C.UTF-8");
        command
    }
}

/// An apt configuration, read after the system's, so that its proxies and keys still count.
fn configuration(root: &Path) -> String {
    let root = root.display();
    format!(
        "Dir::State \"{root}/state\";\n\
         Dir::State::lists \"{root}/state/lists\";\n\
         Dir::State::status \"/dev/null\";\n\
         Dir::Cache \"{root}/cache\";\n\
         Dir::Cache::archives \"{root}/cache/archives\";\n\
         Dir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{root}/sources.list.d\";\n\
         // Hooks of the system's apt would act on the system.\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         // Descriptions for software centres.\n\
         #clear Acquire::IndexTargets::deb::DEP-11;\n\
         // Run by root, apt would download as a user that cannot enter root's home directory.\n\
         APT::Sandbox::User \"root\";\n\
         APT::Architectures {{ \"amd64\"; }};\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"3\";\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bookworm() -> OsRelease {
        OsRelease::parse("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n").unwrap()
    }

    #[test]
    fn one_line_entries_gain_sources_and_keep_their_options() {
        let mut sources = Sources::default();
        sources.add_list(
            "# deb http://off.example/debian bookworm main\n\
             deb http://deb.debian.org/debian bookworm main contrib # the archive\n\
             deb [ arch=amd64 signed-by=/k.gpg ] http://mirror.example/debian bookworm-updates main\n\
             deb-src http://deb.debian.org/debian bookworm main contrib\n\
             deb http://download.example/linux bookworm stable\n\
             deb cdrom\n",
            &bookworm(),
        );
        assert_eq!(
            sources.list,
            "deb http://deb.debian.org/debian bookworm main contrib\n\
             deb-src http://deb.debian.org/debian bookworm main contrib\n\
             deb [signed-by=/k.gpg] http://mirror.example/debian bookworm-updates main\n\
             deb-src [signed-by=/k.gpg] http://mirror.example/debian bookworm-updates main\n"
        );
    }

    #[test]
    fn deb822_stanzas_gain_sources_and_keep_their_key() {
        let mut sources = Sources::default();
        sources.add_deb822(
            "Types: deb\n# a comment\nURIs: http://deb.debian.org/debian\n\
             Suites: bookworm bookworm-updates bookworm-backports\nComponents: main\nArchitectures: amd64 i386\n\
             Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n\
             Types: deb\nURIs: https://other.example\nSuites: nodistro\nComponents: main\n\n\
             Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n",
            &bookworm(),
        );
        assert_eq!(
            sources.deb822,
            "Types: deb deb-src\nSuites: bookworm bookworm-updates\nURIs: http://deb.debian.org/debian\n\
             Components: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n"
        );
    }

    #[test]
    fn files_of_both_formats_are_read_and_others_are_not() {
        let etc = tempfile::tempdir().unwrap();
        let parts = etc.path().join("sources.list.d");
        assert!(Sources::read(etc.path(), &bookworm()).unwrap().is_empty());
        fs::create_dir(&parts).unwrap();
        fs::write(etc.path().join("sources.list"), "deb http://a.example bookworm main\n").unwrap();
        fs::write(
            parts.join("b.sources"),
            "Types: deb\nURIs: http://b.example\nSuites: bookworm\nComponents: main\n",
        )
        .unwrap();
        fs::write(parts.join("c.list.save"), "deb http://c.example bookworm main\n").unwrap();
        let sources = Sources::read(etc.path(), &bookworm()).unwrap();
        assert!(sources.list.contains("deb-src http://a.example bookworm main"), "{sources:?}");
        assert!(sources.deb822.contains("http://b.example"), "{sources:?}");
        assert!(!sources.list.contains("c.example"), "{sources:?}");
    }

    #[test]
    fn garbage_is_passed_over() {
        let mut sources = Sources::default();
        for text in ["deb", "deb [", "deb [x] ", "deb [x]y bookworm", "deb  \u{0} \n\n:\n :", " Types: deb"] {
            sources.add_list(text, &bookworm());
            sources.add_deb822(text, &bookworm());
        }
        assert!(sources.is_empty(), "{sources:?}");
    }
}
