//! Tables and numbers for people.

use std::fmt::Write;

/// Rows under their heads, columns of numbers to the right; nothing if there are no rows.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let cells = |column: usize| rows.iter().filter_map(move |row| row.get(column));
    let wide = |cell: &String| cell.chars().count();
    let columns: Vec<(usize, bool)> = head
        .iter()
        .enumerate()
        .map(|(index, title)| {
            let width = cells(index).chain(std::iter::once(title)).map(wide).max().unwrap_or(0);
            (width, cells(index).all(|cell| !cell.contains(|c: char| c.is_alphabetic() && c != 'e')))
        })
        .collect();
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, (width, right)) in row.iter().zip(&columns) {
            // Writing to a string cannot fail.
            let _ = if *right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:width$}  ") };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A whole number with its thousands apart.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A measured number in five digits or so.
pub fn number(value: f64) -> String {
    if value == 0.0 || (1e-3..1e5).contains(&value.abs()) { format!("{value:.4}") } else { format!("{value:.3e}") }
}

/// The same, or a dash for none.
pub fn maybe(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), number)
}

/// Sizes as people write them: `4096 x 1024`.
pub fn sizes(shape: &[usize]) -> String {
    shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ")
}

/// Sorted numbers with runs drawn together: `0-3, 7`.
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let shown =
        |(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    let more = if runs.len() > 6 { ", …" } else { "" };
    runs.iter().take(6).map(shown).collect::<Vec<_>>().join(", ") + more
}

/// One line for each warning.
pub fn warnings(warnings: &[String]) -> String {
    warnings.iter().fold(String::new(), |text, warning| text + "warning: " + warning + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!([count(0), count(999), count(1000), count(12_345_678)], ["0", "999", "1,000", "12,345,678"]);
        assert_eq!([number(0.0), number(1.5), number(1e-9), number(1e7)], ["0.0000", "1.5000", "1.000e-9", "1.000e7"]);
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
    }

    #[test]
    fn columns_of_numbers_are_flush_right() {
        let rows = [["a", "12"], ["long", "3"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&["name", "count"], &rows), "name  count\na        12\nlong      3\n");
        assert_eq!(table(&["name"], &[]), "");
    }
}
