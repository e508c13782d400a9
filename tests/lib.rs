//! Checks every arrow.
