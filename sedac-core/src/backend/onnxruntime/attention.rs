//! Layers without their MLPs, for tokens that exit softly.

use super::runtime::{layer_session, run};
use super::{OnnxRuntime, Slot};
use crate::backend::{AttentionOnly, EnginePart};
use crate::error::Result;

impl OnnxRuntime {
    /// Load the attention engines, once.
    fn load_attention(&mut self) -> Result<()> {
        if self.attention.len() == self.attention_entries.len() {
            return Ok(());
        }
        let files = self.attention_entries.iter().map(|entry| &*entry.file);
        self.bundle.check_more_memory(files)?;
        for entry in &self.attention_entries {
            let session = layer_session(&self.environment, &self.bundle, entry)?;
            self.attention.push(session);
        }
        Ok(())
    }
}

impl AttentionOnly for OnnxRuntime {
    fn run_attention(&mut self, engine: usize) -> Result<()> {
        self.load_attention()?;
        let Slot { passes, shared, .. } = &mut self.slots[self.selected];
        let pass = passes.current_mut();
        pass.bind_attention(
            &self.attention,
            &self.attention_entries,
            (shared, &self.caches),
        )?;
        let entry = &self.attention_entries[engine];
        let part = EnginePart::Attention(entry.range());
        self.stopwatch.time(part, pass.contexts.tokens(), || {
            run(&mut self.attention[engine], &pass.attention[engine], || {
                format!("attention engine {}", entry.file.display())
            })
        })?;
        passes.engines_run = engine + 1;
        Ok(())
    }
}
