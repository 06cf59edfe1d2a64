//! Files in the user's cache directory. Any process may replace or remove them at any time; without
//! them, what they hold is found out again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;
use tracing::debug;

/// A file of JSON in the cache directory.
#[derive(Debug, Clone)]
pub(crate) struct CacheFile(PathBuf);

impl CacheFile {
    /// The file `name` among those of `kind`; None for users without a cache directory.
    pub(crate) fn new(kind: &str, name: &str) -> Option<Self> {
        let directory = dirs::cache_dir()?.join("sedac").join(kind);
        Some(Self::at(directory.join(name).with_extension("json")))
    }

    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// What it holds; None where there is no such file, or it does not parse.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Option<T> {
        let path = self.0.display();
        let text = fs::read(&self.0);
        let text = text.inspect_err(|error| debug!(%path, %error, "no cache file"));
        let value = serde_json::from_slice(&text.ok()?);
        let value = value.inspect_err(|error| debug!(%path, %error, "damaged cache file ignored"));
        value.ok()
    }

    /// Replace it as a whole: other processes read what was there before, or `value`. Where that is
    /// impossible, nothing changes.
    pub(crate) fn write<T: Serialize>(&self, value: &T) {
        let written = replace(&self.0, value);
        let path = self.0.display();
        let _ = written.inspect_err(|error| debug!(%path, %error, "cache file not written"));
    }
}

fn replace<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(directory)?;
    let file = NamedTempFile::new_in(directory)?;
    serde_json::to_writer(&file, value)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn file(directory: &Path) -> CacheFile {
        CacheFile::at(directory.join("kind/name.json"))
    }

    #[test]
    fn what_was_written_last_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path());
        assert_eq!(file.read::<u32>(), None);
        file.write(&1);
        file.write(&2);
        assert_eq!(file.read(), Some(2));
        let entries = fs::read_dir(directory.path().join("kind")).unwrap();
        assert_eq!(entries.count(), 1);
    }

    #[test]
    fn damaged_files_are_as_if_they_were_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path());
        file.write(&vec![1, 2, 3]);
        fs::write(&file.0, "[1, 2").unwrap();
        assert_eq!(file.read::<Vec<u32>>(), None);
        file.write(&vec![4]);
        assert_eq!(file.read(), Some(vec![4]));
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        // nobody, not even root, makes a directory below a file
        fs::write(directory.path().join("kind"), "").unwrap();
        let file = file(directory.path());
        file.write(&1);
        assert_eq!(file.read::<u32>(), None);
    }

    #[test]
    fn readers_never_see_half_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = file(directory.path());
        file.write(&vec![0_u32; 1000]);
        thread::scope(|scope| {
            for writer in 1..4_u32 {
                let file = &file;
                scope.spawn(move || (0..50).for_each(|_| file.write(&vec![writer; 1000])));
            }
            for _ in 0..200 {
                let read: Vec<u32> = file.read().expect("one of the files that were written");
                assert!(read.len() == 1000 && read.iter().all(|number| *number == read[0]));
            }
        });
    }
}
