//! The runner of guest tests. This file is the room's one entrance: nothing outside names a file of
//! it.

mod applies;
mod batch;
mod binary;
mod canary;
mod defects;
mod pool;
mod said;
mod selftests;
mod single;

pub(crate) use binary::{Binary, binaries};
pub(crate) use canary::run as canaries;
pub(crate) use defects::run as defects;
pub(crate) use pool::{Lane, Pool, jobs};
pub(crate) use selftests::{
    Choice as Selftests, Options as SelftestOptions, compare, run as selftests,
};
pub(crate) use single::{one, together};
