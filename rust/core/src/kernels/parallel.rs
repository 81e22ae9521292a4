//! Work on the items of a list, by several threads.

use std::sync::Mutex;

use crate::threads;

/// What `work` returns for each item, in their order, with a scratch of its own for each of at most so many threads.
///
/// The caller is one of the threads: little work does not wake the others.
pub fn parallel<I: Send, S: Default, R: Send>(
    threads: usize,
    items: impl ExactSizeIterator<Item = I> + Send,
    work: impl Fn(I, &mut S) -> R + Sync,
) -> Vec<R> {
    let mut results: Vec<Option<R>> = Vec::new();
    results.resize_with(items.len(), || None);
    let others = threads.min(items.len()).saturating_sub(1);
    let queue = Mutex::new(items.zip(&mut results));
    let take = || queue.lock().ok().and_then(|mut queue| queue.next());
    let run = || {
        let mut scratch = S::default();
        while let Some((item, result)) = take() {
            *result = Some(work(item, &mut scratch));
        }
    };
    let shared = || {
        threads::in_place_scope(|scope| {
            (0..others).for_each(|_| scope.spawn(|_| run()));
            run();
        })
    };
    // Where there are no others to be had, the caller does it alone.
    if others == 0 || shared().is_err() {
        run();
    }
    drop(queue);
    results.into_iter().flatten().collect()
}
