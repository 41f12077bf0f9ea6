//! The access file: who has which role, on which machines.
//!
//! ```toml
//! [[grant]]
//! who = "cert:alice"           # or "uid:1000", or "user:ci"
//! role = "probe"               # view, probe, operate, admin
//! machines = ["build-*"]       # patterns of names; all without it
//! ```

use std::path::Path;

use serde::Deserialize;

use super::calls::Role;
use super::identity::Identity;
use crate::exit::Failure;

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum Who {
    User(u32),
    Certificate(String),
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "Vec<String>")]
struct Machines(Vec<glob::Pattern>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Grant {
    who: Who,
    role: Role,
    /// All, without it.
    machines: Option<Machines>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    grant: Vec<Grant>,
}

impl TryFrom<String> for Who {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.split_once(':') {
            Some(("cert", name)) if !name.is_empty() => Ok(Who::Certificate(name.to_owned())),
            Some(("uid", uid)) => {
                let uid = uid.parse();
                uid.map(Who::User).map_err(|_| format!("'{text}': a user id is a number, as uid:1000"))
            }
            Some(("user", name)) => match nix::unistd::User::from_name(name) {
                Ok(Some(user)) => Ok(Who::User(user.uid.as_raw())),
                Ok(None) => Err(format!("'{text}': this host has no such user")),
                Err(error) => Err(format!("'{text}': the user cannot be looked up: {error}")),
            },
            _ => Err(format!("'{text}': give cert:NAME, uid:NUMBER or user:NAME")),
        }
    }
}

impl TryFrom<Vec<String>> for Machines {
    type Error = String;

    fn try_from(patterns: Vec<String>) -> Result<Self, Self::Error> {
        if patterns.is_empty() {
            return Err("no machine is named; leave it out for all machines".to_owned());
        }
        let parsed = patterns.iter().map(|pattern| {
            glob::Pattern::new(pattern).map_err(|error| format!("'{pattern}' is no pattern: {error}"))
        });
        parsed.collect::<Result<_, _>>().map(Self)
    }
}

impl Grant {
    fn is_for(&self, who: &Identity) -> bool {
        match (&self.who, who) {
            (Who::User(granted), Identity::User { uid, .. }) => granted == uid,
            (Who::Certificate(granted), Identity::Certificate { name, .. }) => granted == name,
            _ => false,
        }
    }

    fn covers(&self, machine: &str) -> bool {
        self.machines.as_ref().is_none_or(|Machines(patterns)| patterns.iter().any(|it| it.matches(machine)))
    }
}

/// Who may do what.
#[derive(Debug)]
pub struct Access {
    /// The user that runs the service: it and root may do everything, whatever the file says.
    owner: u32,
    grants: Vec<Grant>,
}

impl Access {
    /// What the file says; without one, nobody but the owner and root may do anything.
    ///
    /// # Errors
    /// It cannot be read, or is not as it must be.
    pub fn read(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Self::parse("").map_err(Failure::Usage) };
        let wrong = |what: String| Failure::Usage(format!("--access {}: {what}", path.display()));
        let text =
            std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        Ok(Self { owner: rustix::process::geteuid().as_raw(), grants: file.grant })
    }

    fn is_owners(&self, uid: u32) -> bool {
        uid == self.owner || uid == 0
    }

    /// Whether this is the user that runs the service, or root.
    pub fn is_owner(&self, who: &Identity) -> bool {
        matches!(who, Identity::User { uid, .. } if self.is_owners(*uid))
    }

    fn highest_of(&self, who: &Identity, counts: impl Fn(&Grant) -> bool) -> Option<Role> {
        if self.is_owner(who) {
            return Some(Role::Admin);
        }
        self.grants.iter().filter(|grant| grant.is_for(who) && counts(grant)).map(|grant| grant.role).max()
    }

    /// A client's role on a machine, whether there is one of that name or not: the highest of its grants.
    pub fn role(&self, who: &Identity, machine: &str) -> Option<Role> {
        self.highest_of(who, |grant| grant.covers(machine))
    }

    /// A client's highest role on any machine.
    pub fn highest(&self, who: &Identity) -> Option<Role> {
        self.highest_of(who, |_| true)
    }

    /// Whether users other than the owner and root are to reach the socket.
    pub fn lets_other_users_in(&self) -> bool {
        self.grants.iter().any(|grant| matches!(grant.who, Who::User(uid) if !self.is_owners(uid)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::SystemTime;

    fn user(uid: u32) -> Identity {
        Identity::User { uid, pid: None }
    }

    fn certificate(name: &str) -> Identity {
        let address = ([127, 0, 0, 1], 1).into();
        Identity::Certificate { name: name.to_owned(), address, expires: SystemTime::now() }
    }

    /// A user who is not the one that runs the tests.
    fn stranger() -> u32 {
        rustix::process::geteuid().as_raw() + 1000
    }

    #[test]
    fn the_highest_grant_that_covers_a_machine_counts() {
        let text = format!(
            r#"
            [[grant]]
            who = "cert:alice"
            role = "view"
            [[grant]]
            who = "cert:alice"
            role = "operate"
            machines = ["t*", "x-[0-9]"]
            [[grant]]
            who = "uid:{}"
            role = "probe"
            machines = ["u"]
            "#,
            stranger()
        );
        let access = Access::parse(&text).unwrap();
        let alice = certificate("alice");
        for (machine, role) in [
            ("t", Role::Operate),
            ("t1", Role::Operate),
            ("x-7", Role::Operate),
            ("x-", Role::View),
            ("u", Role::View),
        ] {
            assert_eq!(access.role(&alice, machine), Some(role), "{machine}");
        }
        assert_eq!(access.highest(&alice), Some(Role::Operate));
        assert_eq!(access.role(&certificate("Alice"), "t"), None);
        assert_eq!(access.highest(&certificate("alice ")), None);
        assert_eq!(
            (access.role(&user(stranger()), "u"), access.role(&user(stranger()), "t")),
            (Some(Role::Probe), None)
        );
        // A user's number is no certificate's name.
        assert_eq!(access.highest(&certificate(&stranger().to_string())), None);
        assert!(access.lets_other_users_in());
    }

    #[test]
    fn the_owner_and_root_may_do_everything_whatever_the_file_says() {
        let own = rustix::process::geteuid().as_raw();
        for text in [String::new(), format!("[[grant]]\nwho = 'uid:{own}'\nrole = 'view'\n")] {
            let access = Access::parse(&text).unwrap();
            assert_eq!(access.role(&user(own), "t"), Some(Role::Admin));
            assert_eq!(access.role(&user(0), "t"), Some(Role::Admin));
            assert_eq!(access.highest(&user(stranger())), None);
            assert!(!access.lets_other_users_in());
        }
        let root = Access::parse("[[grant]]\nwho = 'user:root'\nrole = 'view'\n").unwrap();
        assert_eq!(root.grants[0].who, Who::User(0));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, line, what) in [
            ("[[grant]]\nwho = \"bob\"\nrole = \"view\"\n", 2, "give cert:NAME, uid:NUMBER or user:NAME"),
            ("[[grant]]\nwho = \"cert:\"\nrole = \"view\"\n", 2, "give cert:NAME"),
            ("[[grant]]\nwho = \"uid:x\"\nrole = \"view\"\n", 2, "a user id is a number"),
            ("[[grant]]\nwho = \"uid:-1\"\nrole = \"view\"\n", 2, "a user id is a number"),
            ("[[grant]]\nwho = \"user:no-such-user\"\nrole = \"view\"\n", 2, "no such user"),
            ("[[grant]]\nwho = \"cert:a\"\nrole = \"root\"\n", 3, "expected one of `view`, `probe`"),
            ("[[grant]]\nwho = \"cert:a\"\nrole = \"view\"\nmachines = [\"[\"]\n", 4, "is no pattern"),
            ("[[grant]]\nwho = \"cert:a\"\nrole = \"view\"\nmachines = []\n", 4, "leave it out"),
            ("[[grant]]\nwho = \"cert:a\"\nrole = \"view\"\nmachine = \"t\"\n", 4, "unknown field `machine`"),
            ("[[grants]]\nwho = \"cert:a\"\nrole = \"view\"\n", 1, "unknown field `grants`"),
            ("[[grant]]\nwho = \"cert:a\"\n", 1, "missing field `role`"),
            ("[[grant]]\n\nwho = \n", 3, "value"),
        ] {
            let said = Access::parse(text).unwrap_err();
            assert!(said.contains(what) && said.contains(&format!("line {line},")), "{text}: {said}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,200}") {
            let _ = Access::parse(&text);
        }
    }
}
