//! The decode loop over a toy model, by backends that decide on the host and on a device.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod batch;
mod batch_exits;
mod batches;
mod divisions;
mod exit_drafts;
mod lossless;
mod not_finite;
mod passes;
mod run_ahead;
mod scheduled;
mod scheduled_events;
mod scheduled_prefill;
mod scheduled_slots;
mod step_thread;
mod steps_ahead;
mod toy;
mod trained_drafter;
