//! Where a merge may not write: into its own inputs, whatever links lead there.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result, show_name};

/// Refuses an output that is one of `inputs`, lies in one, or holds one.
pub fn check(out: &Path, inputs: &[(&str, &Path)]) -> Result<()> {
    let out = existing(out)?;
    for (what, input) in inputs {
        let real = input.canonicalize().map_err(|error| Error::storage(input, "open", error))?;
        let folder = if real.is_dir() { real.as_path() } else { real.parent().unwrap_or(&real) };
        let relation = if same(&out.real, folder)? && out.whole {
            "is"
        } else if within(&out.real, &real)? {
            "lies inside"
        } else if out.whole && within(&real, &out.real)? {
            "holds"
        } else {
            continue;
        };
        return Err(Error::Merge(format!(
            "the output {} {relation} the {what} {}; hint: a merge never changes its inputs, name a folder elsewhere",
            show_name(&out.named.to_string_lossy()),
            show_name(&input.to_string_lossy())
        )));
    }
    Ok(())
}

/// The output, or as much of its path as there is.
struct Existing {
    named: PathBuf,
    real: PathBuf,
    /// Whether the output itself exists.
    whole: bool,
}

fn existing(out: &Path) -> Result<Existing> {
    let absolute = std::path::absolute(out).map_err(|error| Error::storage(out, "open", error))?;
    let found = absolute.ancestors().find_map(|path| Some((path == absolute, path.canonicalize().ok()?)));
    let (whole, real) = found.unwrap_or((false, absolute.clone()));
    Ok(Existing { named: out.to_owned(), real, whole })
}

/// Whether `path` or a folder above it is `folder`, by identity and not by name.
fn within(path: &Path, folder: &Path) -> Result<bool> {
    for ancestor in path.ancestors() {
        if same(ancestor, folder)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn same(a: &Path, b: &Path) -> Result<bool> {
    let look = |path: &Path| identity(path).map_err(|error| Error::storage(path, "open", error));
    Ok(look(a)? == look(b)?)
}

/// What no two folders share; it takes no permission to read them, only to pass through.
#[cfg(unix)]
fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> std::io::Result<PathBuf> {
    path.canonicalize()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn an_output_is_kept_apart_from_the_inputs() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("models/base");
        std::fs::create_dir_all(base.join("sub")).unwrap();
        let refused = |out: &Path| check(out, &[("base", &base)]).err().map(|error| error.to_string());
        for (out, relation) in [
            (base.clone(), "is the base"),
            (base.join("sub/../."), "is the base"),
            (base.join("new/deep"), "lies inside the base"),
            (root.path().join("models"), "holds the base"),
        ] {
            assert!(refused(&out).is_some_and(|message| message.contains(relation)), "{}", out.display());
        }
        for out in [root.path().join("models/base2"), root.path().join("new/deep")] {
            assert_eq!(refused(&out), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_do_not_hide_an_input() {
        let root = tempfile::tempdir().unwrap();
        let (base, link) = (root.path().join("base"), root.path().join("link"));
        std::fs::create_dir(&base).unwrap();
        std::os::unix::fs::symlink(&base, &link).unwrap();
        assert!(check(&link, &[("base", &base)]).is_err());
        assert!(check(&link.join("out"), &[("base", &base)]).is_err());
        assert!(check(&base, &[("base", &link)]).is_err());
    }
}
