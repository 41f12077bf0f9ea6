use super::*;
use crate::axes::Kpti;
use crate::axes::Only;

fn cells(text: &str) -> Vec<String> {
    let file = MatrixFile::parse(text).unwrap();
    let varying = file.varying();
    file.cells().unwrap().iter().map(|cell| cell.label(&varying)).collect()
}

fn refused(text: &str) -> String {
    MatrixFile::parse(text).unwrap_err().to_string()
}

#[test]
fn the_first_axis_changes_slowest() {
    let text = "[axes]\nvcpus = [1, 2]\nkernel = ['a', 'b']\n";
    assert_eq!(cells(text), ["a vcpus=1", "a vcpus=2", "b vcpus=1", "b vcpus=2"]);
}

#[test]
fn what_a_file_leaves_out_has_one_value() {
    let file = MatrixFile::parse("axes.kernel = ['demo']").unwrap();
    let cells = file.cells().unwrap();
    assert_eq!(cells.len(), 1);
    assert_eq!((cells[0].vcpus, cells[0].memory.0, cells[0].kpti), (1, 512 << 20, Kpti::Auto));
    assert_eq!(cells[0].label(&file.varying()), "demo");
}

#[test]
fn every_set_of_probes_has_its_cells() {
    let sets = "[[probes.entry]]\nspec = 'tick'\n[[probes.none]]\nspec = 'tock'\n";
    assert_eq!(cells(&format!("axes.kernel = ['demo']\n{sets}")), ["entry", "none"]);
    assert_eq!(cells(&format!("axes.kernel = ['demo']\naxes.probes = ['none']\n{sets}")), ["demo"]);
}

#[test]
fn cells_are_left_out_bound_and_added() {
    let axes = "[axes]\nkernel = ['cloud', 'rt']\nvcpus = [1, 2]\nkaslr = [false, true]\n";
    let excluded = cells(&format!("{axes}[[exclude]]\nkernel = 'rt'\nvcpus = 1\n"));
    assert_eq!(excluded.len(), 6);
    assert!(!excluded.iter().any(|cell| cell.starts_with("rt vcpus=1")), "{excluded:?}");

    let pinned = cells(&format!(
        "{axes}[[pin]]\nwhen = {{ kernel = 'rt' }}\nonly = {{ vcpus = 2, kaslr = [true] }}\n"
    ));
    assert_eq!(pinned.len(), 5);
    assert_eq!(pinned[4], "rt vcpus=2 kaslr");

    let included = cells(&format!("{axes}[[include]]\nkernel = 'old'\nvcpus = 64\nkaslr = false\n"));
    assert_eq!(included.len(), 9);
    assert_eq!(included[8], "old vcpus=64 nokaslr");
    // One that is there already is no second one.
    assert_eq!(cells(&format!("{axes}[[include]]\nkernel = 'rt'\nvcpus = 1\n")).len(), 8);
}

#[test]
fn errors_have_their_line() {
    let unknown = refused("[axes]\nkernel = ['demo']\nvcpu = [1]\n");
    assert!(unknown.starts_with("line 3, column 1: unknown field `vcpu`"), "{unknown}");
    assert_eq!(
        refused("[axes]\nkernel = ['demo']\nvcpus = []\n"),
        "line 3, column 9: the axis `vcpus` has no value; leave it out, or give one"
    );
    assert_eq!(
        refused("[axes]\nkernel = ['a', 'b', 'a']\n"),
        "line 2, column 21: `a` is on the axis `kernel` twice"
    );
    let none = refused("[axes]\nvcpus = [1]\n");
    assert!(none.contains("there is no axis `kernel`"), "{none}");
    let syntax = refused("[axes]\nkernel = ['demo'\n\n[limits]\n");
    assert!(syntax.starts_with("line "), "{syntax}");
    assert_eq!(
        refused("axes.kernel = ['demo']\naxes.probes = ['entry']\n"),
        "line 2, column 16: there is no set of probes `entry`"
    );
    assert_eq!(
        refused("axes.kernel = ['demo']\n[[include]]\nkernel = 'ticker'\nprobes = 'entry'\n"),
        "line 4, column 10: there is no set of probes `entry`"
    );
    assert_eq!(
        refused("axes.kernel = ['demo']\n[[same]]\nof = 'count'\nacross = ['kernel']\nprobes = ['f']\n"),
        "line 5, column 11: there is no probe with the spec `f`"
    );
    assert_eq!(
        refused("axes.kernel = ['demo']\n[[exclude]]\nvcpus = [1, 3]\n"),
        "line 3, column 9: `3` is not on the axis `vcpus`"
    );
    let pattern = refused("axes.kernel = ['demo']\nconsole.must = ['ok', '(']\n");
    assert!(pattern.starts_with("line 2, column 16: regex parse error"), "{pattern}");
    let size = refused("axes.kernel = ['demo']\naxes.memory = ['lots']\n");
    assert!(size.starts_with("line 2, column 15: `lots` is not a size like 512M"), "{size}");
}

#[test]
fn cells_are_picked_by_values_on_the_command_line() {
    let file = MatrixFile::parse("[axes]\nkernel = ['a', 'b=c']\nvcpus = [1, 2, 4]\nkaslr = [false, true]\n")
        .unwrap();
    let picked = |texts: &[&str]| {
        let only: Vec<Only> = texts.iter().map(|text| text.parse().unwrap()).collect();
        file.cells().unwrap().iter().filter(|cell| Only::picks(&only, cell)).count()
    };
    assert_eq!(picked(&[]), 12);
    assert_eq!(picked(&["kernel=b=c"]), 6);
    assert_eq!(picked(&["vcpus=1", "vcpus=4", "kaslr=true"]), 4);
    assert_eq!(picked(&["vcpus=3"]), 0);
    for bad in ["", "vcpus", "cpus=1"] {
        let error = bad.parse::<Only>().unwrap_err();
        assert!(error.contains("AXIS=VALUE like vcpus=2"), "{error}");
    }
}

#[test]
fn a_product_of_a_million_cells_is_counted_and_not_made() {
    let list = |count: u32| (1..=count).map(|number| number.to_string()).collect::<Vec<_>>().join(", ");
    let words = |count: u32| (1..=count).map(|number| format!("'w{number}'")).collect::<Vec<_>>().join(", ");
    let text = format!("[axes]\nkernel = ['demo']\nvcpus = [{}]\ncmdline = [{}]\n", list(1000), words(1000));
    assert_eq!(MatrixFile::parse(&text).unwrap().cells(), Err(1_000_000));
}

#[test]
fn numbers_beyond_63_bits_are_texts() {
    let bounds = |text: &str| {
        let file = format!("axes.kernel = ['demo']\n[[probes.p]]\nspec = 'f'\nvalues = {{ x = {text} }}\n");
        MatrixFile::parse(&file).map(|file| file.probes["p"][0].values["x"])
    };
    assert!(bounds("'0xffffffffffffff9c'").unwrap().hold((-100_i64).cast_unsigned()));
    assert!(bounds("7").unwrap().hold(7));
    let between = bounds("{ min = 1, max = '0xff' }").unwrap();
    assert_eq!([0, 1, 255, 256].map(|number| between.hold(number)), [false, true, true, false]);
    assert_eq!(between.to_string(), "1 to 255");
    bounds("{ least = 1 }").unwrap_err();
    bounds("-1").unwrap_err();
}
