//! The only access to a bundle's files.
//!
//! Whatever is opened is a regular file inside of the bundle's directory, named by a relative path
//! of plain components: no link leads out, no pipe or device is waited for. What the manifest lists
//! is opened only as it was when its digest was checked.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, File, OpenOptions, OpenOptionsExt};
use rayon::prelude::*;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::graphs::Graphs;
use super::verified::Verified;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;

/// Largest file that is read into memory whole: protobuf's own limit for a graph.
const MAX_READ: u64 = 1 << 31;

/// Bytes hashed between two looks at the interrupt.
const CHUNK: usize = 1 << 20;

/// Size and digest of a file.
#[derive(Debug, Clone, Deserialize)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its contents, in lower-case hexadecimal.
    pub sha256: String,
}

/// What changes when a file is written or replaced, and not when it gets another link or mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// Whether files are hashed that were hashed before and have not changed since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verify {
    /// All files are hashed.
    #[default]
    Always,
    /// Only those whose size, time of modification or inode differ from when they were found whole. Damage that
    /// changes none of these, such as a failing disk's, goes unnoticed.
    Changed,
}

impl Verify {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Always, Self::Changed];

    /// The name used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Changed => "changed",
        }
    }
}

/// A bundle's directory, and the files that the manifest lists once they were checked.
#[derive(Debug)]
pub struct Gate {
    /// As the user wrote it, for messages.
    given: PathBuf,
    /// Absolute and without links, so that a change of the working directory does not matter.
    root: PathBuf,
    directory: Dir,
    files: BTreeMap<PathBuf, FileEntry>,
    checked: BTreeMap<PathBuf, Identity>,
    skipped: usize,
    /// What is known of the checked graphs.
    pub(super) graphs: Graphs,
}

impl Gate {
    /// Access to `directory`, of which no file is listed yet.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is not a directory.
    pub fn open(directory: &Path) -> Result<Self> {
        let opened = fs::canonicalize(directory)
            .and_then(|root| Ok((Dir::open_ambient_dir(&root, ambient_authority())?, root)));
        let (handle, root) = opened.map_err(|error| {
            let reason = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    "not a bundle (it is not a directory); build one with sedac-export build".into()
                }
                _ => format!("cannot be opened: {error}"),
            };
            Error::bundle(directory, reason)
        })?;
        Ok(Self {
            given: directory.to_owned(),
            root,
            directory: handle,
            files: BTreeMap::new(),
            checked: BTreeMap::new(),
            skipped: 0,
            graphs: Graphs::new(),
        })
    }

    /// The bundle's directory, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The graph in `file`, and the directory of its weights, both as they were checked.
    ///
    /// # Errors
    /// [`Error::DamagedFile`] naming the file that was written or replaced since.
    pub(crate) fn graph(&self, file: &Path) -> Result<(Vec<u8>, PathBuf)> {
        let data = self.graphs.get(file).map(|graph| &graph.data);
        for data in data.into_iter().flatten() {
            self.path(data)?;
        }
        let directory = file.parent().unwrap_or(Path::new(""));
        Ok((self.read(file)?, self.root.join(directory)))
    }

    /// How messages name the bundle.
    pub fn shown_directory(&self) -> PathBuf {
        self.given.clone()
    }

    /// How messages name the file `name`.
    pub fn shown(&self, name: impl AsRef<Path>) -> PathBuf {
        self.given.join(name)
    }

    /// Files whose digests were computed, and files that were not because they had not changed.
    pub fn hashed_and_skipped(&self) -> (usize, usize) {
        (self.checked.len() - self.skipped, self.skipped)
    }

    /// Check `files` and let only them through from now on. `manifest` is the digest of what lists
    /// them.
    ///
    /// # Errors
    /// [`Error::Bundle`] naming one that is not a regular file inside the bundle,
    /// [`Error::DamagedFile`] naming one that is missing, truncated or altered, [`Error::Io`] when
    /// one cannot be read, [`Error::Cancelled`] when interrupted.
    pub fn check(
        &mut self,
        files: BTreeMap<PathBuf, FileEntry>,
        manifest: &str,
        verify: Verify,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let before = match verify {
            Verify::Always => Verified::default(),
            Verify::Changed => Verified::load(manifest),
        };
        let checked = files.par_iter().map(|(name, entry)| {
            interrupt.check()?;
            let known = before.files.get(name);
            let (identity, skipped) = self.check_file(name, entry, known, interrupt)?;
            Ok((name.clone(), identity, skipped))
        });
        let checked = checked.collect::<Result<Vec<_>>>()?;
        self.skipped = checked.iter().filter(|(.., skipped)| *skipped).count();
        let identities = checked.into_iter();
        self.checked = identities
            .map(|(name, identity, _)| (name, identity))
            .collect();
        self.files = files;
        if verify == Verify::Changed {
            Verified::new(self.checked.clone()).save(manifest);
        }
        Ok(())
    }

    /// The contents of `name`, which have the digest that the manifest gives.
    ///
    /// # Errors
    /// [`Error::Bundle`] when the manifest does not list it, and as [`check`](Self::check).
    pub fn read(&self, name: &Path) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let contents = self.read_unlisted(name, MAX_READ)?;
        let contents = contents.ok_or_else(|| self.damaged(name, "missing"))?;
        if hex(&Sha256::digest(&contents)) != entry.sha256 {
            return Err(self.damaged(name, "altered"));
        }
        Ok(contents)
    }

    /// As [`read`](Self::read), for a text.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is not UTF-8, and as [`read`](Self::read).
    pub fn read_text(&self, name: &Path) -> Result<String> {
        String::from_utf8(self.read(name)?).map_err(|error| {
            let reason = format!("not UTF-8 ({error}); build the bundle again");
            Error::bundle(&self.shown(name), reason)
        })
    }

    /// The contents of `name`, which no digest covers; None when there is no such file.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is over `max` bytes or no regular file inside of the bundle,
    /// [`Error::Io`] when it cannot be read.
    pub fn read_unlisted(&self, name: &Path, max: u64) -> Result<Option<Vec<u8>>> {
        let Some((file, metadata)) = self.open_regular(name)? else {
            return Ok(None);
        };
        let mut contents = Vec::new();
        let read = file.take(max + 1).read_to_end(&mut contents);
        read.map_err(|source| self.io(name, source))?;
        if metadata.bytes.max(contents.len() as u64) > max {
            let reason = format!("over {max} bytes, which no such file of a bundle has");
            return Err(Error::bundle(&self.shown(name), reason));
        }
        Ok(Some(contents))
    }

    /// Where `name` lies, for libraries that open files themselves; it is what was checked.
    ///
    /// # Errors
    /// [`Error::Bundle`] when the manifest does not list it, [`Error::DamagedFile`] when it was
    /// written or replaced since it was checked.
    pub fn path(&self, name: &Path) -> Result<PathBuf> {
        self.entry(name)?;
        let path = self.root.join(name);
        let now = fs::metadata(&path).map_err(|_| self.damaged(name, "missing"))?;
        if self.checked.get(name) != Some(&Identity::of(&now)) {
            return Err(self.damaged(name, "altered"));
        }
        Ok(path)
    }

    /// Whether the manifest lists `name`.
    pub fn lists(&self, name: &Path) -> bool {
        self.files.contains_key(name)
    }

    /// The size of `name`, None when the manifest does not list it.
    pub fn bytes(&self, name: &Path) -> Option<u64> {
        self.files.get(name).map(|entry| entry.bytes)
    }

    fn entry(&self, name: &Path) -> Result<&FileEntry> {
        let reason = "not among the files that bundle.json lists; build the bundle again";
        let entry = self.files.get(name);
        entry.ok_or_else(|| Error::bundle(&self.shown(name), reason))
    }

    fn check_file(
        &self,
        name: &Path,
        entry: &FileEntry,
        known: Option<&Identity>,
        interrupt: &Interrupt,
    ) -> Result<(Identity, bool)> {
        let Some((file, identity)) = self.open_regular(name)? else {
            return Err(self.damaged(name, "missing"));
        };
        if identity.bytes < entry.bytes {
            return Err(self.damaged(name, "truncated"));
        }
        if identity.bytes > entry.bytes {
            return Err(self.damaged(name, "altered"));
        }
        if known == Some(&identity) {
            return Ok((identity, true));
        }
        let digest = sha256(file, interrupt).map_err(|error| match error {
            Hashing::Cancelled(error) => error,
            Hashing::Io(source) => self.io(name, source),
        })?;
        if digest != entry.sha256 {
            return Err(self.damaged(name, "altered"));
        }
        Ok((identity, false))
    }

    /// Open `name` to read; None when nothing has that name.
    fn open_regular(&self, name: &Path) -> Result<Option<(File, Identity)>> {
        let refused = || {
            let reason = "not a regular file inside of the bundle; build or copy the bundle again";
            Error::bundle(&self.shown(name), reason)
        };
        if !is_plain(name) {
            return Err(refused());
        }
        let mut options = OpenOptions::new();
        // a pipe must not be waited for
        let options = options
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32);
        let file = match self.directory.open_with(name, options) {
            Ok(file) => file,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => return Ok(None),
                // what leads out of the directory
                io::ErrorKind::PermissionDenied if error.raw_os_error().is_none() => {
                    return Err(refused());
                }
                // a circle of links; a socket, or a device that nothing drives
                _ if [Errno::LOOP, Errno::NXIO]
                    .map(Some)
                    .contains(&Errno::from_io_error(&error)) =>
                {
                    return Err(refused());
                }
                _ => return Err(self.io(name, error)),
            },
        };
        let file = file.into_std();
        let metadata = file.metadata().map_err(|source| self.io(name, source))?;
        if !metadata.is_file() {
            return Err(refused());
        }
        Ok(Some((File::from_std(file), Identity::of(&metadata))))
    }

    fn damaged(&self, name: &Path, state: &'static str) -> Error {
        let path = self.shown(name);
        Error::DamagedFile { path, state }
    }

    fn io(&self, name: &Path, source: io::Error) -> Error {
        let path = self.shown(name);
        Error::Io { path, source }
    }
}

/// Whether `name` is relative and of plain components only: no root, no `.` and no `..`.
fn is_plain(name: &Path) -> bool {
    let mut components = name.components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
}

enum Hashing {
    Cancelled(Error),
    Io(io::Error),
}

fn sha256(mut file: File, interrupt: &Interrupt) -> std::result::Result<String, Hashing> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        interrupt.check().map_err(Hashing::Cancelled)?;
        match file.read(&mut buffer).map_err(Hashing::Io)? {
            0 => return Ok(hex(&hasher.finalize())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// `bytes` in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for name in ["a", "onnx/layer_000.onnx", "a//b"] {
            assert!(is_plain(Path::new(name)), "{name}");
        }
        for name in ["", "/a", "../a", "a/../b", "./a", "."] {
            assert!(!is_plain(Path::new(name)), "{name}");
        }
    }
}
