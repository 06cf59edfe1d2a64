//! What decides that a token may stop. Each policy is one file.

mod forced;
mod stability;

pub use forced::Forced;
pub use stability::Stability;

/// What a layer tells about a token.
#[derive(Debug, Clone, Copy)]
pub struct Signals {
    /// (cos(h_l, h_{l-1}) + 1) / 2 of the residual stream after and before the layer.
    pub stability: f32,
}

/// Why a token stopped where it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// All layers ran.
    FullDepth,
    /// Enough consecutive layers were stable.
    Stability,
    /// The depth was prescribed.
    Forced,
}

impl ExitReason {
    /// The name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::FullDepth => "full_depth",
            Self::Stability => "stability",
            Self::Forced => "forced",
        }
    }
}

/// Decides, layer by layer, whether a token may stop.
pub trait Policy: Send {
    /// A new token starts at the first layer.
    fn begin(&mut self);

    /// `depth` layers have run (1 to the number of layers); `signals` are the last one's.
    ///
    /// Returns the reason if the token may stop here. It is asked after every layer, also where
    /// the bundle allows no exit, so that a run of layers is counted whole.
    fn observe(&mut self, depth: usize, signals: Signals) -> Option<ExitReason>;
}
