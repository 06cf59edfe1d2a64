//! Between text and tokens.

use std::ops::Deref;

use tokenizers::Tokenizer;
use tokenizers::tokenizer::step_decode_stream;

use crate::error::{Error, Result};

/// A bundle's tokenizer.
#[derive(Debug, Clone)]
pub struct TextCodec {
    tokenizer: Tokenizer,
}

impl TextCodec {
    /// The codec that the contents of a tokenizer.json describe.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when they cannot be used.
    pub fn new(contents: &[u8]) -> Result<Self> {
        let tokenizer = Tokenizer::from_bytes(contents).map_err(failed)?;
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
    pub fn stream(&self) -> TextStream<&Self> {
        TextStream::new(self)
    }
}

/// Gives the text of tokens as they come, only whole characters at a time.
///
/// A token's text may depend on those before it, so the newest ones are decoded together with those
/// that gave the last piece.
#[derive(Debug)]
pub struct TextStream<C> {
    codec: C,
    tokens: Vec<u32>,
    emitted: String,
    /// The tokens that are decoded again, their text without the newest ones, and the number of those
    /// before these: what [`step_decode_stream`] keeps.
    window: Vec<u32>,
    prefix: String,
    prefix_tokens: usize,
}

impl<C: Deref<Target = TextCodec>> TextStream<C> {
    /// A text of which there is nothing yet.
    pub fn new(codec: C) -> Self {
        Self {
            codec,
            tokens: Vec::new(),
            emitted: String::new(),
            window: Vec::new(),
            prefix: String::new(),
            prefix_tokens: 0,
        }
    }

    /// The text that `token` completes; empty while a character is unfinished.
    pub fn push(&mut self, token: u32) -> String {
        self.tokens.push(token);
        let piece = step_decode_stream(
            &self.codec.tokenizer,
            vec![token],
            true,
            &mut self.window,
            &mut self.prefix,
            &mut self.prefix_tokens,
        );
        // a stream that loses its place stays silent; finish() gives what came after
        let piece = piece.ok().flatten().unwrap_or_default();
        self.emitted.push_str(&piece);
        piece
    }

    /// What the pieces so far lack of the whole text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer fails.
    pub fn finish(&self) -> Result<String> {
        let whole = self.codec.decode(&self.tokens)?;
        // a decoder may take back what it gave, such as bytes that turned out to be no character
        let same = whole.chars().zip(self.emitted.chars());
        let same: usize = same
            .take_while(|(ours, theirs)| ours == theirs)
            .map(|(character, _)| character.len_utf8())
            .sum();
        Ok(whole[same..].to_owned())
    }
}

/// Looks for strings that end a text, in its pieces as they come.
#[derive(Debug, Clone)]
pub struct StopStrings {
    strings: Vec<String>,
    /// The end of the text so far, as long as a string that starts in it may go on.
    tail: String,
}

impl StopStrings {
    /// Look for any of `strings`.
    ///
    /// # Errors
    /// [`Error::Setting`] when one is empty.
    pub fn new(strings: Vec<String>) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            return Err(Error::setting("stop_strings", "\"\"", "texts, none empty"));
        }
        let tail = String::new();
        Ok(Self { strings, tail })
    }

    /// Whether a string ends in `piece`, the text's next.
    pub fn push(&mut self, piece: &str) -> bool {
        self.tail.push_str(piece);
        let found = self.strings.iter().any(|stop| self.tail.contains(stop));
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let cut = (self.tail.len() + 1).saturating_sub(longest);
        self.tail.drain(..self.tail.ceil_char_boundary(cut));
        found
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer of single bytes that spells characters as Llama 2 does: <0xNN>.
    fn bytes() -> TextCodec {
        let vocabulary: Vec<String> = (0..256)
            .map(|byte| format!("\"<0x{byte:02X}>\": {byte}"))
            .collect();
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [],
                "decoder": {{"type": "Sequence", "decoders": [{{"type": "ByteFallback"}}, {{"type": "Fuse"}}]}},
                "model": {{"type": "BPE", "byte_fallback": true, "vocab": {{{}}}, "merges": []}}}}"#,
            vocabulary.join(", ")
        );
        TextCodec {
            tokenizer: json.parse().unwrap(),
        }
    }

    fn pieces(tokens: &[u8]) -> (Vec<String>, String) {
        let codec = bytes();
        let mut stream = codec.stream();
        let pieces = tokens
            .iter()
            .map(|&byte| stream.push(byte.into()))
            .collect();
        (pieces, stream.finish().unwrap())
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        let mut stops = StopStrings::new(vec!["好b".into(), "\n\n".into()]).unwrap();
        let found: Vec<_> = ["\n", "a\n", "a好", "b", "b"]
            .map(|piece| stops.push(piece))
            .into();
        assert_eq!(found, [false, false, false, true, false]);
        assert!(StopStrings::new(vec![String::new()]).is_err());
        assert!(!StopStrings::new(Vec::new()).unwrap().push("a"));
    }

    #[test]
    fn a_character_comes_whole() {
        let (pieces, rest) = pieces("a🙂b".as_bytes());
        assert_eq!(pieces, ["a", "", "", "", "🙂", "b"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn an_unfinished_character_is_owed_at_the_end() {
        let (pieces, rest) = pieces(&[b'a', 0xF0]);
        assert_eq!(pieces[0], "a");
        assert!(rest.chars().all(|character| character == '\u{FFFD}') && !rest.is_empty());
    }

    #[test]
    fn nothing_is_lost_after_bytes_that_are_no_character() {
        let tokens = ["好".as_bytes(), &[0xFF], b"abc"].concat();
        let (pieces, rest) = pieces(&tokens);
        let text = pieces.concat() + &rest;
        assert!(text.ends_with("abc") || text.contains('\u{FFFD}'), "{text}");
        let whole = bytes()
            .decode(&tokens.iter().map(|&b| b.into()).collect::<Vec<u32>>())
            .unwrap();
        assert!(
            text.ends_with(&whole[whole.len() - 3..]),
            "{text} lacks the end of {whole}"
        );
    }
}
