//! A layer's engine: one session, or three where its graph is cut around attention.

use ort::session::{IoBinding, Session};

use super::cut_graph::Crossing;
use super::runtime::run;
use crate::error::Result;

/// A layer's engine.
pub(super) enum LayerSession {
    /// In one session.
    Whole(Session),
    /// In three.
    Cut(Box<CutLayer>),
}

/// The sessions of a graph that is cut around attention.
pub(super) struct CutLayer {
    pub(super) before: Session,
    pub(super) attention: Session,
    /// Whether attention takes a row each of several sequences.
    pub(super) has_batches: bool,
    pub(super) after: Session,
    /// What crosses the cuts: all that attention is given, and last what it makes of it.
    pub(super) crossings: Vec<Crossing>,
}

/// The tensors that a layer reads and writes in one pass.
pub(super) enum BoundLayer {
    /// Of one session.
    Whole(Box<IoBinding>),
    /// Of three.
    Cut(Box<BoundCut>),
}

/// The tensors of a [`CutLayer`].
pub(super) struct BoundCut {
    pub(super) before: IoBinding,
    /// None in passes over rows of several sequences, whose attention runs in other passes.
    pub(super) attention: Option<IoBinding>,
    pub(super) after: IoBinding,
}

impl LayerSession {
    /// The widths of what crosses cuts; none where there are none.
    pub(super) fn widths(&self) -> Vec<usize> {
        match self {
            Self::Whole(_) => Vec::new(),
            Self::Cut(layer) => layer.crossings.iter().map(|each| each.width).collect(),
        }
    }

    /// Run the layer over `bound`, with `attend` in the place of attention where that has none; `what`
    /// names it in an error.
    ///
    /// # Panics
    /// Where `bound` is of a layer that is cut otherwise.
    pub(super) fn run(
        &mut self,
        bound: &BoundLayer,
        attend: impl FnOnce(&mut Session) -> Result<()>,
        what: impl Fn() -> String,
    ) -> Result<()> {
        match (self, bound) {
            (Self::Whole(session), BoundLayer::Whole(bound)) => run(session, bound, what),
            (Self::Cut(layer), BoundLayer::Cut(bound)) => {
                run(&mut layer.before, &bound.before, &what)?;
                match &bound.attention {
                    Some(bound) => run(&mut layer.attention, bound, &what)?,
                    None => attend(&mut layer.attention)?,
                }
                run(&mut layer.after, &bound.after, what)
            }
            _ => unreachable!("passes are bound to the layers that there are"),
        }
    }
}
