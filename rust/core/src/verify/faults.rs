//! From verdicts on tensors to what went wrong, in sentences.

use std::collections::BTreeMap;

use super::explain::{kind, number};
use super::{Row, Verdict};
use crate::error::show_name;

/// How many names a fault lists.
const LISTED: usize = 6;

/// What the rows say is wrong; `extra` are tensors that should not be there.
pub fn faults(rows: &[Row], extra: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let missing: Vec<&Row> = rows.iter().filter(|row| row.verdict == Verdict::Missing).collect();
    if !missing.is_empty() && 2 * missing.len() >= rows.len() {
        found.push(format!(
            "{} of {} tensors are not there under their names, and {} others are: it was saved with other names or \
             fused weights, so that little can be told",
            missing.len(),
            rows.len(),
            extra.len()
        ));
        return found;
    }
    let changed: Vec<&Row> = rows.iter().filter(|row| !row.copied).collect();
    let of = |what: fn(&Verdict) -> bool| rows.iter().filter(|row| what(&row.verdict)).collect::<Vec<_>>();
    let total = changed.len();
    let unmerged = of(|verdict| *verdict == Verdict::Unmerged);
    if !unmerged.is_empty() && unmerged.len() == total {
        found.push(format!("not merged at all: none of {total} tensors has its change"));
    } else {
        found.extend(listed(&format!("of {total} tensors lack their change"), &unmerged));
    }
    scaled(&of(|verdict| matches!(verdict, Verdict::Times(_))), total, &mut found);
    swapped(rows, &mut found);
    for (what, rows) in [
        ("tensors differ in a way that the adapter does not explain", of(|verdict| *verdict == Verdict::Other)),
        ("tensors changed that the adapter leaves alone", of(|verdict| *verdict == Verdict::Touched)),
        ("tensors are not finite", of(|verdict| *verdict == Verdict::NotFinite)),
        ("tensors are missing", missing),
    ] {
        found.extend(listed(what, &rows));
    }
    for row in rows {
        if let Verdict::Unlike([expected, is]) = &row.verdict {
            found.push(format!("{} is {is}, not {expected}", name(row)));
        }
    }
    if !extra.is_empty() {
        let shown: Vec<String> = extra.iter().take(LISTED).map(|name| show_name(name)).collect();
        found.push(format!("{} tensors should not be there: {}{}", extra.len(), shown.join(", "), dots(extra.len())));
    }
    found
}

/// One sentence for all tensors that have their change as often, or nearly so.
fn scaled(rows: &[&Row], total: usize, found: &mut Vec<String>) {
    let mut times: Vec<f64> = rows
        .iter()
        .filter_map(|row| if let Verdict::Times(times) = row.verdict { Some(times) } else { None })
        .collect();
    times.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (times.first(), times.last()) else { return };
    let middle = times.get(times.len() / 2).copied().unwrap_or(1.0);
    if most - least > 0.1 * middle.abs() {
        found.extend(listed(&format!("of {total} tensors have their change with another scale"), rows));
        return;
    }
    let what = if (middle - 2.0).abs() < 0.1 {
        "merged twice".to_owned()
    } else if (middle + 1.0).abs() < 0.05 {
        "subtracted instead of merged".to_owned()
    } else {
        format!("merged with {middle:.3} times the scale")
    };
    found.push(if rows.len() == total {
        format!("{what}: all {total} tensors have {middle:.3} times their change")
    } else {
        let names: Vec<String> = rows.iter().take(LISTED).map(|row| name(row)).collect();
        format!("{what}: {} of {total} tensors, {}{}", rows.len(), names.join(", "), dots(rows.len()))
    });
}

/// One sentence for each kind of tensors that stand in each other's places.
fn swapped(rows: &[Row], found: &mut Vec<String>) {
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in rows {
        if let (Verdict::Swapped(from), Some(own)) = (&row.verdict, number(row)) {
            kinds.entry(kind(row)).or_default().push(format!("{own} has that of {from}"));
        }
    }
    for (kind, swaps) in kinds {
        let shown = swaps.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
        found.push(format!("permuted: of {}, {shown}{}", show_name(&kind), dots(swaps.len())));
    }
}

fn listed(what: &str, rows: &[&Row]) -> Option<String> {
    let names: Vec<String> = rows.iter().take(LISTED).map(|row| name(row)).collect();
    (!rows.is_empty()).then(|| format!("{} {what}: {}{}", rows.len(), names.join(", "), dots(rows.len())))
}

fn name(row: &Row) -> String {
    let name = show_name(&row.name);
    row.part.map_or_else(|| name.clone(), |part| format!("{name}[{part}]"))
}

fn dots(count: usize) -> &'static str {
    if count > LISTED { ", …" } else { "" }
}
