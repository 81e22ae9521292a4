//! The threads that work is spread over: those of the pool that the caller is in, or else of the one that the process has.
//!
//! Not rayon's global pool: a child made by `fork` gets a copy of it whose threads do not exist, and whoever waits for them
//! waits for ever. The pool here is known by one pointer, which is empty again in a child, so that the child makes a pool of its
//! own; what it has of its parent's is left where it lies, neither joined nor unlocked. The pointer is read and set without a
//! lock, so that no thread can hold one at the time of the fork.

use std::io;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use rayon::{Scope, ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// The process's own pool once it is made, from a box that is never freed.
static POOL: AtomicPtr<ThreadPool> = AtomicPtr::new(null_mut());

/// Runs `work` where parallel iterators and `rayon::join` spread over threads of this process.
pub fn install<R: Send>(work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if rayon::current_thread_index().is_some() { work() } else { pool()?.install(work) }
}

/// Runs `work` in the caller's thread, and what it spawns in others.
pub fn in_place_scope<'scope, R>(work: impl FnOnce(&Scope<'scope>) -> R) -> Result<R> {
    Ok(if rayon::current_thread_index().is_some() { rayon::in_place_scope(work) } else { pool()?.in_place_scope(work) })
}

/// Makes sure that children of this process get pools of their own. Called while it has one thread, also that no fork meets
/// the little that is made once and under a lock.
pub fn survive_forks() -> Result<()> {
    static WATCHING: OnceLock<i32> = OnceLock::new();
    let refused = *WATCHING.get_or_init(|| {
        // All pools have this, and the first thread that looks for work makes it.
        crossbeam_epoch::default_collector();
        watch_forks()
    });
    if refused == 0 { Ok(()) } else { Err(no_threads(&io::Error::from_raw_os_error(refused))) }
}

#[cfg(unix)]
fn watch_forks() -> i32 {
    extern "C" fn in_child() {
        POOL.store(null_mut(), Ordering::Relaxed);
    }
    // SAFETY: a child may store to an atomic, and the library that the function is in is never unloaded.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) }
}

#[cfg(not(unix))]
fn watch_forks() -> i32 {
    0
}

/// The process's own pool, made by the first who asks.
fn pool() -> Result<&'static ThreadPool> {
    survive_forks()?;
    // SAFETY: what the pointer was set to is a pool that nobody frees.
    if let Some(pool) = unsafe { POOL.load(Ordering::Acquire).as_ref() } {
        return Ok(pool);
    }
    let builder = ThreadPoolBuilder::new().thread_name(|index| format!("peftrs-{index}"));
    let made = Box::into_raw(Box::new(builder.build().map_err(|error| no_threads(&error))?));
    if POOL.compare_exchange(null_mut(), made, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        // SAFETY: another thread was the first, and nobody has seen this one, which comes from a box.
        drop(unsafe { Box::from_raw(made) });
    }
    pool()
}

fn no_threads(reason: &dyn std::error::Error) -> Error {
    let hint = "allow this process more threads (`ulimit -u`), or set RAYON_NUM_THREADS to fewer";
    Error::Merge(format!("cannot start threads: {reason}; hint: {hint}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn name() -> String {
        std::thread::current().name().unwrap_or_default().to_owned()
    }

    #[test]
    fn work_goes_to_the_process_s_pool_or_stays_in_the_caller_s() {
        assert!(install(|| Ok(name())).unwrap().starts_with("peftrs-"));
        let caller = name();
        let mut spawned = String::new();
        in_place_scope(|scope| {
            assert_eq!(name(), caller);
            scope.spawn(|_| spawned = name());
        })
        .unwrap();
        assert!(spawned.starts_with("peftrs-"), "{spawned}");
        let own = ThreadPoolBuilder::new().num_threads(1).thread_name(|_| "own".to_owned()).build().unwrap();
        own.install(|| {
            assert_eq!(install(|| Ok(name())).unwrap(), "own");
            in_place_scope(|scope| scope.spawn(|_| assert_eq!(name(), "own"))).unwrap();
        });
    }

    #[test]
    fn threads_that_ask_at_once_get_one_pool() {
        let asked: Vec<usize> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| std::ptr::from_ref(pool().unwrap()).addr())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(asked.iter().all(|found| Some(found) == asked.first()), "{asked:?}");
    }

    #[test]
    fn nothing_is_spread_over_the_global_pool() {
        let mut folders =
            vec!["core/src", "cli/src", "python/src"].into_iter().map(std::path::PathBuf::from).collect::<Vec<_>>();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut seen = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(root.join(&folder)).unwrap() {
                let entry = entry.unwrap();
                let path = folder.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    folders.push(path);
                } else if !path.ends_with("core/src/threads.rs") {
                    let text = std::fs::read_to_string(entry.path()).unwrap();
                    let count = |what: &str| text.matches(what).count();
                    let spread = [
                        ".par_",
                        ".into_par_",
                        "rayon::join(",
                        "rayon::in_place_scope",
                        "rayon::scope",
                        "rayon::spawn",
                    ];
                    let spread: usize = spread.into_iter().map(count).sum();
                    assert_eq!(spread, count("threads::install("), "{}", path.display());
                    seen += spread;
                }
            }
        }
        assert!(seen > 10, "{seen}");
    }

    #[test]
    fn what_all_pools_share_is_of_one_version() {
        // Of two, the one that is made early would not be rayon's.
        let lock = include_str!("../../../Cargo.lock");
        assert_eq!(lock.matches("name = \"crossbeam-epoch\"").count(), 1);
    }
}
