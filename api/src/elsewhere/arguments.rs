//! The command line of `vmprobe run`, with other files in the place of the user's.

use std::ffi::OsString;

use clap::CommandFactory;

use crate::cli::Cli;

/// A value on the command line.
struct Value {
    /// The long name of its option; `None` for IMAGE, which belongs to no option.
    option: Option<String>,
    /// The word that it is, or that ends with it.
    word: usize,
}

/// The words behind the name of the program, the first of them `run`, and the values among them as clap takes them.
pub struct Arguments {
    words: Vec<OsString>,
    values: Vec<Value>,
}

impl Arguments {
    pub fn new(words: Vec<OsString>) -> Self {
        let command = Cli::command();
        let takes_value = |name: &str| {
            command.find_subcommand("run").is_some_and(|run| {
                run.get_arguments().any(|one| one.get_long() == Some(name) && one.get_action().takes_values())
            })
        };
        let mut values = Vec::new();
        let mut rest = words.iter().enumerate().skip(1);
        while let Some((word, argument)) = rest.next() {
            let text = argument.to_string_lossy();
            let (option, word) = if text == "--" {
                values.extend(rest.map(|(word, _)| Value { option: None, word }));
                break;
            } else if let Some(option) = text.strip_prefix("--") {
                match option.split_once('=') {
                    Some((name, _)) => (Some(name.to_owned()), word),
                    None if !takes_value(option) => continue,
                    None => match rest.next() {
                        Some((word, _)) => (Some(option.to_owned()), word),
                        None => break,
                    },
                }
            } else if text.starts_with('-') && text != "-" {
                continue;
            } else {
                (None, word)
            };
            values.push(Value { option, word });
        }
        Self { words, values }
    }

    /// Puts another value in the place of each that an option has (IMAGE for `None`) and `other` has one for.
    pub fn replace(&mut self, option: Option<&str>, mut other: impl FnMut(&str) -> Option<OsString>) {
        for value in self.values.iter().filter(|value| value.option.as_deref() == option) {
            let word = &mut self.words[value.word];
            let text = word.to_string_lossy();
            // One that is a word of its own has no name before it.
            let name = option.map(|option| format!("--{option}=")).filter(|name| text.starts_with(name));
            let name = name.unwrap_or_default();
            if let Some(other) = other(&text[name.len()..]) {
                let mut replaced = OsString::from(name);
                replaced.push(other);
                *word = replaced;
            }
        }
    }

    /// The words, with options before the user's.
    pub fn into_words(self, first: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
        let mut words = self.words;
        words.splice(words.len().min(1)..words.len().min(1), first);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        Arguments::new(words.iter().map(OsString::from).collect())
    }

    #[test]
    fn the_image_is_found_among_the_options() {
        let with_another = |words: &[&str]| {
            let mut arguments = arguments(words);
            arguments.replace(None, |_| Some("other".into()));
            arguments.into_words([])
        };
        assert_eq!(with_another(&["run", "disk.img"]), ["run", "other"]);
        assert_eq!(
            with_another(&["run", "--serial", "disk.img", "--verbose", "-v", "disk.img"]),
            ["run", "--serial", "disk.img", "--verbose", "-v", "other"]
        );
        assert_eq!(
            with_another(&["run", "--serial=disk.img", "--count", "disk.img", "--probe", "x"]),
            ["run", "--serial=disk.img", "--count", "other", "--probe", "x"]
        );
        let hidden = ["run", "--cmdline", "--x", "--", "disk.img"];
        assert_eq!(with_another(&hidden), ["run", "--cmdline", "--x", "--", "other"]);
        assert_eq!(with_another(&["run", "--probe"]), ["run", "--probe"]);
    }

    #[test]
    fn a_value_is_replaced_where_it_is_the_option_s() {
        let words = [
            "run",
            "-",
            "--probes",
            "-",
            "--probes=-",
            "--cmdline",
            "--probes=-",
            "--probes",
            "f",
            "--",
            "-",
        ];
        let mut arguments = arguments(&words);
        arguments.replace(Some("probes"), |value| (value == "-").then(|| "/tmp/x".into()));
        let mut expected = words;
        (expected[3], expected[4]) = ("/tmp/x", "--probes=/tmp/x");
        assert_eq!(arguments.into_words([]), expected);
    }

    #[test]
    fn options_can_be_put_before_the_user_s() {
        assert_eq!(arguments(&["run", "a"]).into_words(["--disk=b".into()]), ["run", "--disk=b", "a"]);
        assert_eq!(arguments(&[]).into_words([]), [""; 0]);
    }
}
