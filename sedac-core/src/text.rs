//! Between text and tokens.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// A bundle's tokenizer.
#[derive(Debug, Clone)]
pub struct TextCodec {
    tokenizer: Tokenizer,
}

impl TextCodec {
    /// Load tokenizer.json at `path`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file cannot be used.
    pub fn load(path: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::from_file(path).map_err(failed)?;
        Ok(Self { tokenizer })
    }

    /// Token ids of `text`, with the special tokens that the model expects around a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens`, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(failed)
    }

    /// Decode a text token by token.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream {
            codec: self,
            tokens: Vec::new(),
            steps: self.tokenizer.decode_stream(true),
            emitted: String::new(),
        }
    }
}

/// Gives the text of tokens as they come, only whole characters at a time.
pub struct TextStream<'a> {
    codec: &'a TextCodec,
    tokens: Vec<u32>,
    steps: tokenizers::DecodeStream<
        'a,
        tokenizers::ModelWrapper,
        tokenizers::NormalizerWrapper,
        tokenizers::PreTokenizerWrapper,
        tokenizers::PostProcessorWrapper,
        tokenizers::DecoderWrapper,
    >,
    emitted: String,
}

impl TextStream<'_> {
    /// The text that `token` completes; empty while a character is unfinished.
    pub fn push(&mut self, token: u32) -> String {
        self.tokens.push(token);
        // a stream that loses its place stays silent; finish() then gives the rest
        let piece = self.steps.step(token).ok().flatten().unwrap_or_default();
        self.emitted.push_str(&piece);
        piece
    }

    /// What the pieces so far lack of the whole text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn finish(&self) -> Result<String> {
        let whole = self.codec.decode(&self.tokens)?;
        Ok(whole
            .strip_prefix(&self.emitted)
            .unwrap_or_default()
            .to_owned())
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}
