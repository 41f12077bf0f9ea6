use proptest::prelude::*;

use super::synthetic::{Layout, build};
use super::*;

const TEXT: u64 = 0xffff_ffff_8100_0000;
const END: u64 = 0xffff_ffff_8300_0000;
/// Where the tables are linked.
const TABLES: Gva = Gva(0xffff_ffff_8220_0000);

fn decode_block(data: &[u8]) -> Result<SymbolTable, KallsymsError> {
    let regions = [Gva(TEXT)..Gva(END)];
    read(&[Block { data, gva: TABLES }], &regions, |gva| (TEXT..END).contains(&gva.0))
}

/// `count` symbols, some of them per-CPU if `percpu`, some at the same address.
fn symbols(count: usize, percpu: bool) -> Vec<(String, u64)> {
    let percpu = if percpu { count / 10 } else { 0 };
    (0..count)
        .map(|at| {
            if at < percpu {
                (format!("Acpu_var_{at}"), at as u64 * 8)
            } else {
                (format!("{}do_sys_call_{at:x}", ['T', 't', 'd'][at % 3]), TEXT + (at as u64 / 2) * 48)
            }
        })
        .collect()
}

fn texts(table: &SymbolTable) -> Vec<(String, u64)> {
    table.iter().map(|symbol| (format!("{}{}", symbol.kind.0, symbol.name), symbol.gva.0)).collect()
}

#[test]
fn every_layout_is_found_and_decoded() {
    for layout in Layout::ALL {
        for count in [1, 2, 3, 255, 256, 257, 1000, 5000] {
            let symbols = symbols(count, layout.has_percpu());
            let table = decode_block(&build(layout, &symbols, TABLES));
            assert_eq!(table.as_ref().map(texts), Ok(symbols), "{layout:?}, {count} symbols");
        }
    }
}

#[test]
fn a_name_of_more_than_127_codes_has_a_two_byte_length() {
    let mut symbols = symbols(300, false);
    // Every byte value is a code of its own for these names, so nothing is compressed.
    symbols[7].0 = format!("T{}", "0123456789abcdefghijklmnopqrstuvwxyz".repeat(14));
    for layout in [Layout::Offsets32, Layout::TokensFirst, Layout::SelfRelative] {
        assert_eq!(decode_block(&build(layout, &symbols, TABLES)).as_ref().map(texts), Ok(symbols.clone()));
    }
}

#[test]
fn data_without_tables_has_none() {
    for data in [vec![], vec![0; 4096], (0..=u8::MAX).cycle().take(100_000).collect()] {
        assert_eq!(decode_block(&data).err(), Some(KallsymsError::NotFound));
    }
    // The numbers 0 to 255 behind zeros describe a table of 256 empty tokens.
    let mut data = vec![0; 4096];
    data.extend((0..256u16).flat_map(u16::to_le_bytes));
    assert_eq!(decode_block(&data).err(), Some(KallsymsError::NotFound));
}

#[test]
fn a_wrong_count_and_a_wrong_length_are_errors() {
    let symbols = symbols(1000, true);
    let good = build(Layout::Offsets32, &symbols, TABLES);
    let names = good.windows(8).position(|word| word == 1000u64.to_le_bytes()).unwrap() + 8;
    for (what, at) in [("count", names - 8), ("length", names)] {
        let mut data = good.clone();
        data[at] ^= 0x10;
        let error = decode_block(&data).err();
        assert!(matches!(error, Some(KallsymsError::NoNames { .. })), "{what}: {error:?}");
    }
}

#[test]
fn addresses_that_fall_or_lie_elsewhere_are_errors() {
    let mut falling = symbols(600, true);
    falling.swap(100, 500);
    let mut elsewhere = symbols(600, false);
    for (_, address) in &mut elsewhere {
        *address += END - TEXT;
    }
    for symbols in [falling, elsewhere] {
        for layout in [Layout::Absolute64, Layout::Offsets32, Layout::TokensFirst] {
            let error = decode_block(&build(layout, &symbols, TABLES)).err();
            assert!(matches!(error, Some(KallsymsError::NoAddresses { count: 600, .. })), "{error:?}");
        }
    }
}

#[test]
fn names_that_are_none_are_errors() {
    for (text, fault) in [
        ("T".to_owned(), NameFault::Form),
        ("7name".to_owned(), NameFault::Form),
        // 400 codes of two characters each are within a name's packed length, but not within its unpacked one.
        (format!("T{}", "ab".repeat(520)), NameFault::TooLong),
    ] {
        let mut symbols = symbols(300, false);
        symbols[20].0 = text;
        symbols[21].0 = "Tab".to_owned();
        let data = build(Layout::TokensFirst, &symbols, TABLES);
        match decode_block(&data) {
            Err(KallsymsError::BadName { index: 20, fault: found, .. }) => assert_eq!(found, fault),
            // A packed name of more than 511 codes is refused before it is unpacked.
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_table_behind_a_false_one_is_found() {
    let symbols = symbols(700, true);
    let mut data = build(Layout::TokensFirst, &symbols, TABLES);
    // A damaged copy first: its tokens are right and its names are not.
    let mut both = data.clone();
    let count = both.windows(8).position(|word| word == 700u64.to_le_bytes()).unwrap();
    both[count] = 0;
    both.resize(both.len().next_multiple_of(8), 0);
    both.append(&mut data);
    assert_eq!(decode_block(&both).as_ref().map(texts), Ok(symbols));
}

/// Names of one code, everywhere, let every fourth byte be the start of the names until the last has been looked at.
#[test]
fn an_image_full_of_false_names_ends_in_bounded_time() {
    let names = 65_537;
    let mut data = vec![0; 16];
    data.extend([1, 0].repeat(names + 60_000));
    let mut markers = vec![];
    for at in 0..257u32 {
        markers.extend((at * 512).to_le_bytes());
    }
    data.extend([0xff, 0xff]);
    data.resize(data.len().next_multiple_of(8), 0);
    data.extend(markers);
    data.resize(data.len().next_multiple_of(8), 0);
    let mut index = vec![];
    let table_start = data.len();
    for code in 0..=255u8 {
        index.extend(u16::try_from(data.len() - table_start).unwrap().to_le_bytes());
        data.extend([b'T', b'a' + code % 26, 0]);
    }
    data.resize(data.len().next_multiple_of(8), 0);
    data.extend(index);
    let started = std::time::Instant::now();
    assert!(matches!(decode_block(&data), Err(KallsymsError::NoNames { .. })));
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
}

fn any_symbols(percpu: bool) -> impl Strategy<Value = Vec<(String, u64)>> {
    let address =
        if percpu { prop_oneof![1 => 0u64..0x34000, 9 => TEXT..END].boxed() } else { (TEXT..END).boxed() };
    let name = prop_oneof![
        20 => "[TtDdRrBbAWwV][a-z_][a-zA-Z0-9_.$]{0,40}",
        1 => "[Tt][a-zA-Z0-9_.]{200,500}",
    ];
    proptest::collection::vec((name, address), 1..700).prop_map(|mut symbols| {
        symbols.sort_by_key(|(_, address)| *address);
        // A kernel has text, and the search wants half of the symbols there.
        let low = symbols.iter().filter(|(_, address)| *address < TEXT).count();
        if low * 2 > symbols.len() {
            symbols.drain(..low);
        }
        symbols
    })
}

#[test]
fn two_absolute_addresses_are_not_taken_for_distances_from_the_second() {
    let symbols = [("w_", 0xffff_ffff_8100_0000), ("T_", 0xffff_ffff_8100_0001)];
    let symbols = symbols.map(|(text, gva)| (text.to_owned(), gva)).to_vec();
    let table = decode_block(&build(Layout::Absolute64, &symbols, TABLES));
    assert_eq!(table.as_ref().map(texts), Ok(symbols));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_built_is_decoded(
        (layout, symbols) in proptest::sample::select(Layout::ALL.to_vec())
            .prop_flat_map(|layout| (Just(layout), any_symbols(layout.has_percpu())))
    ) {
        prop_assume!(!symbols.is_empty());
        let table = decode_block(&build(layout, &symbols, TABLES));
        prop_assert_eq!(table.as_ref().map(texts), Ok(symbols));
    }

    /// Damage gives an error or other symbols, each at its place in order, and never a panic.
    #[test]
    fn damage_never_panics(
        layout in proptest::sample::select(Layout::ALL.to_vec()),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut data = build(layout, &symbols(600, layout.has_percpu()), TABLES);
        for (at, value) in damage {
            let at = at.index(data.len());
            data[at] = value;
        }
        if let Some(cut) = cut {
            data.truncate(cut.index(data.len()));
        }
        if let Ok(table) = decode_block(&data) {
            prop_assert!(table.iter().zip(table.iter().skip(1)).all(|(a, b)| a.gva <= b.gva));
        }
    }

    #[test]
    fn noise_never_panics(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert_eq!(decode_block(&data).err(), Some(KallsymsError::NotFound));
    }
}
