//! The middle of a few measurements, and how far they spread.

/// The median, and the bounds of the middle half. Outliers, as a busy host makes them, move neither much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quartiles {
    /// A quarter of the values is below.
    pub lower: f64,
    /// Half of them are.
    pub median: f64,
    /// Three quarters are.
    pub upper: f64,
}

impl Quartiles {
    /// Of any number of values; `None` without any.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let at = |quarter: usize| values.get(values.len() * quarter / 4).copied();
        Some(Self { lower: at(1)?, median: at(2)?, upper: at(3)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_do_not_move_the_middle() {
        let middle = Quartiles { lower: 1.0, median: 2.0, upper: 3.0 };
        assert_eq!(Quartiles::of(vec![9e9, 1.0, 3.0, 2.0, -9e9]), Some(middle));
    }

    #[test]
    fn one_value_is_all_of_them_and_none_is_nothing() {
        assert_eq!(Quartiles::of(vec![4.0]), Some(Quartiles { lower: 4.0, median: 4.0, upper: 4.0 }));
        assert_eq!(Quartiles::of(Vec::new()), None);
    }
}
