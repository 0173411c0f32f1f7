//! Parts of the daemon `barleased`: the file of its ledger, and its words. The daemon itself is not
//! there yet.
//!
//! | module | what |
//! |---|---|
//! | [`store`] | the file of the ledger: append, compact, read back after a kill |
//! | [`words`] | the words of the protocol and those of the core |

#![forbid(unsafe_code)]

pub mod store;
pub mod words;
