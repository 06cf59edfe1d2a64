//! Chrome traces of what engines ran, for chrome://tracing and <https://ui.perfetto.dev>.
//!
//! Backends emit a tracing event for every step and engine run; a recording collects those of its
//! thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, debug, trace};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};

use super::{EngineTiming, StepExit};

/// Targets of the events.
const STEP: &str = "sedac_core::step";
const ENGINE: &str = "sedac_core::engine";

/// Emit what a step of `tokens` tokens ran until its `exit`.
pub(super) fn record_step(timings: &[EngineTiming], tokens: usize, exit: StepExit) {
    let (Some(first), Some(last)) = (timings.first(), timings.last()) else {
        return;
    };
    let (start, end) = (first.start, last.start + last.elapsed);
    debug!(
        target: STEP,
        tokens,
        depth = exit.layer,
        reason = exit.reason.name(),
        start_us = microseconds(start),
        elapsed_us = microseconds(end - start),
    );
    for timing in timings {
        trace!(
            target: ENGINE,
            engine = %timing.part,
            tokens = timing.tokens,
            start_us = microseconds(timing.start),
            elapsed_us = microseconds(timing.elapsed),
        );
    }
}

/// To a tenth.
fn microseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e7).round() / 10.0
}

/// Do `work`, and give the Chrome trace of what backends ran for it on this thread, as JSON. A row
/// of the trace has the steps, named by the span they are in, and another the engines.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, String) {
    let recording = Recording::default();
    let events = recording.0.clone();
    let subscriber = Registry::default().with(recording);
    let result = tracing::subscriber::with_default(subscriber, work);
    let events = std::mem::take(&mut *events.lock().unwrap_or_else(PoisonError::into_inner));
    (result, json!({"traceEvents": events}).to_string())
}

#[derive(Default)]
struct Recording(Arc<Mutex<Vec<Value>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recording {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let row = match event.metadata().target() {
            STEP => 1,
            ENGINE => 2,
            _ => return,
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        let Fields(mut fields) = fields;
        let span = context.event_span(event).map(|span| span.name());
        let name = fields.remove("engine").unwrap_or(json!(span));
        let entry = json!({
            "name": name, "ph": "X", "pid": 1, "tid": row,
            "ts": fields.remove("start_us"), "dur": fields.remove("elapsed_us"), "args": fields,
        });
        let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(entry);
    }
}

/// The fields of an event by name.
#[derive(Default)]
struct Fields(BTreeMap<&'static str, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), json!(format!("{value:?}")));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name(), json!(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), json!(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), json!(value));
    }
}

#[cfg(test)]
mod tests {
    use tracing::debug_span;

    use super::super::EnginePart;
    use super::*;
    use crate::policy::ExitReason;

    #[test]
    fn a_recording_has_steps_by_their_span_and_engines() {
        let timing = |part, start, elapsed| EngineTiming {
            part,
            tokens: 3,
            start: Duration::from_micros(start),
            elapsed: Duration::from_micros(elapsed),
        };
        let timings = [
            timing(EnginePart::Layers(0..2), 10, 5),
            timing(EnginePart::Head, 20, 7),
        ];
        let exit = StepExit {
            layer: 2,
            reason: ExitReason::FullDepth,
        };
        let (seven, text) = record(|| {
            let _span = debug_span!("verify").entered();
            record_step(&timings, 3, exit);
            7
        });
        assert_eq!(seven, 7);
        let trace: Value = serde_json::from_str(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let names: Vec<_> = events.iter().map(|event| event["name"].as_str()).collect();
        assert_eq!(names, [Some("verify"), Some("layers 0-1"), Some("head")]);
        assert_eq!(
            (&events[0]["ts"], &events[0]["dur"]),
            (&json!(10.0), &json!(17.0))
        );
        assert_eq!(events[0]["args"]["reason"], "full_depth");
        assert_eq!(
            (&events[2]["tid"], &events[2]["args"]["tokens"]),
            (&json!(2), &json!(3))
        );
    }
}
