//! Quantities with units, as a matrix file has them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes, written with binary units: `512M`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let bytes = parse_size::Config::new().with_binary().parse_size(&text);
        bytes.map(Self).map_err(|error| format!("`{text}` is not a size like 512M: {error}"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "G"), (20, "M"), (10, "K")];
        let unit = units.into_iter().find(|(bits, _)| self.0 != 0 && self.0.is_multiple_of(1 << bits));
        let (bits, letter) = unit.unwrap_or((0, ""));
        write!(f, "{}{letter}", self.0 >> bits)
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.to_string()
    }
}

/// A time, written with its unit: `90s`, `1ms`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Time(pub Duration);

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let time = humantime::parse_duration(&text);
        time.map(Self).map_err(|error| format!("`{text}` is not a time like 90s or 1ms: {error}"))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl From<Time> for String {
    fn from(time: Time) -> Self {
        time.to_string()
    }
}

/// A share, written as `10%`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(try_from = "String")]
pub struct Percent(pub f64);

impl TryFrom<String> for Percent {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = text.strip_suffix('%').and_then(|number| number.trim().parse().ok());
        number
            .filter(|number| (0.0..=10_000.0).contains(number))
            .map(Self)
            .ok_or_else(|| format!("`{text}` is not a share like 10%"))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for (text, bytes) in
            [("512M", 512 << 20), ("1G", 1 << 30), ("1536M", 1536 << 20), ("100", 100), ("0", 0)]
        {
            let size = Size::try_from(text.to_owned()).unwrap();
            assert_eq!((size.0, size.to_string()), (bytes, text.to_owned()));
        }
        assert!(Size::try_from("much".to_owned()).unwrap_err().contains("`much`"));
    }

    #[test]
    fn times_and_shares_have_units() {
        assert_eq!(Time::try_from("90s".to_owned()).unwrap().0, Duration::from_secs(90));
        Time::try_from("90".to_owned()).unwrap_err();
        assert_eq!(Percent::try_from("12.5 %".to_owned()), Ok(Percent(12.5)));
        for bad in ["10", "x%", "-1%", "nan%", "1e9%"] {
            Percent::try_from(bad.to_owned()).unwrap_err();
        }
    }
}
