//! Pool rows and who uses them.

/// Rows of memory that the caller owns, with a count of the table entries that name each.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pub(super) rows: Vec<RowPtr>,
    pub(super) owners: Vec<u32>,
    pub(super) free: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct RowPtr(pub(super) *mut u8);
// SAFETY: rows are disjoint, alive and untouched by others while the cache lives (the contract of `LayerCache::add_rows`).
unsafe impl Send for RowPtr {}
// SAFETY: as above; writes happen through `&mut LayerCache` only.
unsafe impl Sync for RowPtr {}

impl Pool {
    /// A free row, now with one owner.
    pub(super) fn take(&mut self) -> u32 {
        let row = self.free.pop().expect("rows were counted before");
        self.owners[row as usize] = 1;
        row
    }

    /// One owner fewer; the last one frees the row.
    pub(super) fn release(&mut self, row: u32) {
        let owners = &mut self.owners[row as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(row);
        }
    }
}
