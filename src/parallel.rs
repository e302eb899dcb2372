//! Work for the calling thread and the pool's other threads together.
//!
//! A call takes a few milliseconds. Handed to a pool whole, it waits for threads to wake, which the system may then put on one
//! core while the caller sleeps; so the caller takes part, and the pool's threads come to help.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

/// Calls `f` for every item, each thread with a state of its own from `init`. Returns the error of the first item that has
/// one; items after an error may be left out.
pub(crate) fn each<T: Send, S, E: Send>(
    items: Vec<T>,
    init: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let helpers = rayon::current_num_threads().min(items.len()).saturating_sub(1);
    if helpers == 0 {
        let mut state = init();
        return items.into_iter().try_for_each(|item| f(&mut state, item));
    }
    if rayon::current_thread_index().is_some() {
        // Already in the pool: its own way of sharing work.
        let state = &init;
        return items.into_par_iter().try_for_each_init(state, |state, item| f(state, item));
    }
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None::<(usize, E)>));
    let work = || {
        let mut state = init();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { break };
            let Some(item) = item.lock().unwrap_or_else(PoisonError::into_inner).take() else { continue };
            if let Err(error) = f(&mut state, item) {
                // Nobody takes another item; those that began before this one still end.
                next.store(items.len(), Ordering::Relaxed);
                let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|(known, _)| at < *known) {
                    *first = Some((at, error));
                }
                break;
            }
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Calls `f` for every item; results stand in the order of the items.
pub(crate) fn map<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let pairs = items.iter().zip(&mut results).collect();
    let done = each(
        pairs,
        || (),
        |(), (item, result): (&T, &mut Option<R>)| {
            *result = Some(f(item));
            Ok::<(), ()>(())
        },
    );
    debug_assert!(done.is_ok());
    results.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_wherever_it_is_called_from() {
        let numbers: Vec<usize> = (0..1000).collect();
        let twice = || map(&numbers, |n| 2 * n);
        let expected: Vec<usize> = numbers.iter().map(|n| 2 * n).collect();
        assert_eq!(twice(), expected);
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(twice), expected);
        }
        assert_eq!(map(&[] as &[usize], |n| 2 * n), Vec::<usize>::new());
    }

    #[test]
    fn an_error_ends_the_work() {
        for bad in [0, 1, 500, 999] {
            let failing = |(): &mut (), n: usize| if n == bad { Err(n) } else { Ok(()) };
            assert_eq!(each((0..1000).collect(), || (), failing), Err(bad));
        }
    }
}
