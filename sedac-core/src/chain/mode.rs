//! When tokens exit, as requests say it.

use crate::bundle::{DrafterKind, ExitConfig, Manifest};
use crate::error::{Error, Result};
use crate::kv::KvFill;
use crate::policy::{ExitRule, PolicyChoice, PolicySettings};

/// When tokens exit.
#[derive(Debug, Clone, PartialEq)]
pub enum DecodingMode {
    /// Never: every token runs at full depth.
    Full,
    /// When a policy says so.
    Exit {
        /// The policy.
        policy: PolicySettings,
        /// Drafts the tokens that the policy does not let exit, for full depth to verify several
        /// at once. Requires [`KvFill::Defer`] and exits that are not soft.
        drafter: Option<DrafterKind>,
    },
    /// Only to draft: tokens come from full depth, which verifies several drafted ones at once.
    Lossless {
        /// What drafts.
        drafter: DrafterKind,
    },
    /// The n-th decoded token after `depths[n % depths.len()]` layers, whatever the model says:
    /// measures the machinery.
    Forced {
        /// Depths, each 1 to the number of layers.
        depths: Vec<usize>,
    },
}

/// A mode's name in settings and in output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModeName {
    /// Every token runs at full depth.
    Full,
    /// Tokens exit, as a policy says or at forced depths.
    Exit,
    /// Full depth verifies drafts.
    Lossless,
}

impl ModeName {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Full, Self::Exit, Self::Lossless];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Exit => "exit",
            Self::Lossless => "lossless",
        }
    }
}

/// When tokens exit and what the caches of skipped layers get.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodingSetting {
    /// When tokens exit.
    pub mode: DecodingMode,
    /// What the caches of skipped layers get.
    pub kv_fill: KvFill,
}

/// What a caller sets about exits; None leaves it as the bundle has it.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodingChoice {
    /// The mode.
    pub mode: ModeName,
    /// Depths to exit at in turn, whatever the mode and the policy.
    pub forced_exit: Option<Vec<usize>>,
    /// What decides about exits.
    pub policy: PolicyChoice,
    /// What the caches of skipped layers get.
    pub kv_fill: Option<KvFill>,
    /// What drafts.
    pub drafter: Option<DrafterChoice>,
}

/// Whether tokens are drafted, as a caller says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrafterChoice {
    /// None are.
    Off,
    /// By this drafter.
    By(DrafterKind),
}

impl DecodingChoice {
    /// How tokens are decoded in the bundle of `manifest` and `config`.
    ///
    /// # Errors
    /// [`Error::Misplaced`] when settings do not belong together, [`Error::Setting`] when one is out
    /// of range for the bundle.
    pub fn resolve(self, config: &ExitConfig, manifest: &Manifest) -> Result<DecodingSetting> {
        if let (Some(name), true) = (self.policy.first_set(), self.mode != ModeName::Exit) {
            return Err(Error::Misplaced {
                name,
                owner: "mode exit",
                place: format!("{}; set mode exit", self.mode.name()),
            });
        }
        let drafts = self.mode != ModeName::Full && self.forced_exit.is_none();
        if let (Some(DrafterChoice::By(_)), false) = (self.drafter, drafts) {
            return Err(Error::Misplaced {
                name: "drafter",
                owner: "mode lossless or exit",
                place: "full or forced exits; leave it out".into(),
            });
        }
        let policy = self.policy.resolve(&config.policy, |policy| {
            manifest.trained_depths(policy.signal())
        })?;
        let kv_fill = self.kv_fill.unwrap_or(config.kv_fill);
        let mode = match (self.forced_exit, self.mode) {
            (Some(depths), _) => DecodingMode::Forced { depths },
            (None, ModeName::Full) => DecodingMode::Full,
            (None, ModeName::Exit) => {
                let rule = manifest.compile(&policy)?;
                let drafter = match self.drafter {
                    Some(DrafterChoice::Off) => None,
                    Some(DrafterChoice::By(drafter)) => Some(drafter),
                    // the bundle's own, unless the caller chose exits between which it cannot draft
                    None => config
                        .drafter
                        .filter(|drafter| drafter.check_exits(&rule, kv_fill).is_ok()),
                };
                DecodingMode::Exit { policy, drafter }
            }
            (None, ModeName::Lossless) => match self.drafter {
                Some(DrafterChoice::Off) => {
                    let range = "one of the others; mode lossless needs it";
                    return Err(Error::setting("drafter", "none", range));
                }
                Some(DrafterChoice::By(drafter)) => DecodingMode::Lossless { drafter },
                None => DecodingMode::Lossless {
                    drafter: DrafterKind::Auto,
                },
            },
        };
        Ok(DecodingSetting { mode, kv_fill })
    }
}

impl DecodingMode {
    /// The name.
    pub fn name(&self) -> ModeName {
        match self {
            Self::Full => ModeName::Full,
            Self::Exit { .. } | Self::Forced { .. } => ModeName::Exit,
            Self::Lossless { .. } => ModeName::Lossless,
        }
    }

    /// What the caches of skipped layers get; lossless drafts always wait for the pass that verifies
    /// them.
    pub(super) fn kv_fill(&self, requested: KvFill) -> KvFill {
        match self {
            Self::Lossless { .. } => KvFill::Defer,
            _ => requested,
        }
    }

    /// What drafts.
    pub fn drafter(&self) -> Option<DrafterKind> {
        match self {
            Self::Lossless { drafter } => Some(*drafter),
            Self::Exit { drafter, .. } => *drafter,
            _ => None,
        }
    }
}

/// The exit rule of a generation, and the depth limits of its tokens in turn.
#[derive(Debug)]
pub(super) struct ExitSchedule {
    rule: Option<ExitRule>,
    depths: Vec<usize>,
    next: usize,
}

impl ExitSchedule {
    /// For a model of `layers` layers.
    ///
    /// # Errors
    /// [`Error::Setting`] when a setting is out of range, or the drafter cannot draft between the
    /// exits.
    pub(super) fn new(mode: &DecodingMode, kv_fill: KvFill, layers: usize) -> Result<Self> {
        let (rule, depths) = match mode {
            DecodingMode::Full | DecodingMode::Lossless { .. } => (None, vec![layers]),
            DecodingMode::Exit { policy, drafter } => {
                let rule = policy.compile(layers)?;
                if let Some(drafter) = drafter {
                    drafter.check_exits(&rule, kv_fill)?;
                }
                (Some(rule), vec![layers])
            }
            DecodingMode::Forced { depths } => {
                check_depths(depths, layers)?;
                (None, depths.clone())
            }
        };
        Ok(Self {
            rule,
            depths,
            next: 0,
        })
    }

    pub(super) fn rule(&self) -> Option<&ExitRule> {
        self.rule.as_ref()
    }

    /// The depth limit of the next token.
    pub(super) fn max_depth(&self) -> usize {
        self.depths[self.next]
    }

    /// The next token has run.
    pub(super) fn advance(&mut self) {
        self.next = (self.next + 1) % self.depths.len();
    }

    /// The next token is the first again.
    pub(super) fn restart(&mut self) {
        self.next = 0;
    }

    /// Whether a token may exit before it has run all `layers`.
    pub(super) fn may_exit(&self, layers: usize) -> bool {
        self.rule.is_some() || self.depths.iter().any(|&depth| depth < layers)
    }

    /// Whether tokens that exit run the attention of deeper layers.
    pub(super) fn is_soft(&self) -> bool {
        self.rule.as_ref().is_some_and(ExitRule::is_soft)
    }

    /// Whether every token has the same depth limit and the same rule, if any.
    pub(super) fn is_constant(&self) -> bool {
        self.depths.len() == 1
    }

    /// The fewest layers that drafts run, of the depths `exit_layers` up to half of `layers`: to
    /// pass over an exit that the rule takes would lose what it saves. None without a rule.
    pub(super) fn min_draft_depth(&self, exit_layers: &[usize], layers: usize) -> Option<usize> {
        let rule = self.rule()?;
        let exits = exit_layers.iter().copied();
        let taken = exits.filter(|&depth| depth <= layers / 2 && rule.may_exit(depth));
        Some(taken.max().unwrap_or(0))
    }
}

fn check_depths(depths: &[usize], layers: usize) -> Result<()> {
    if depths.is_empty() {
        return Err(Error::setting(
            "forced_exit",
            "(none)",
            "at least one depth",
        ));
    }
    match depths.iter().find(|depth| !(1..=layers).contains(depth)) {
        Some(depth) => {
            let range = format!("1 to {layers}, the model's layers");
            Err(Error::setting("forced_exit", depth, range))
        }
        None => Ok(()),
    }
}
