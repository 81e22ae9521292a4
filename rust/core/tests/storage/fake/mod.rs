//! A file system in memory that fails, is killed or loses power at a chosen call.
//!
//! What a loss of power does is what POSIX allows, which is more than most kernels do: bytes that were not synced are
//! kept, dropped or torn, each write for itself and in any order; so are names that were not synced, but for a rename or
//! an exchange being one step, and changes of the same name or thing keeping their order. A synced file may still have
//! lost its name. Writes are short or interrupted at random.

mod calls;

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard};

/// Numbers that depend on the seed alone.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// What strikes at the call of a number; the first is number one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The process ends: no call from this one on has an effect.
    End(usize),
    /// One call fails, with that error number.
    Once(usize, i32),
    /// From there on, every call that could use room or the disk fails; looking and removing still work.
    From(usize, i32),
    /// One write puts another value in the place of the last, and nothing fails.
    Flip(usize),
}

/// What a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Look,
    Change,
    Remove,
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(usize, Vec<u8>),
    Length(usize),
}

impl Write {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Self::Bytes(offset, bytes) => {
                let end = offset + bytes.len();
                to.resize(to.len().max(end), 0);
                to[*offset..end].copy_from_slice(bytes);
            }
            Self::Length(length) => to.resize(*length, 0),
        }
    }

    /// A part of it, as a disk that lost power in the middle has it.
    fn torn(&self, random: &mut Random) -> Self {
        match self {
            Self::Bytes(offset, bytes) => {
                let (start, end) = (random.below(bytes.len() + 1), random.below(bytes.len() + 1));
                let (start, end) = (start.min(end), start.max(end));
                Self::Bytes(offset + start, bytes[start..end].to_vec())
            }
            whole @ Self::Length(_) => whole.clone(),
        }
    }
}

#[derive(Debug, Clone)]
enum Node {
    File { live: Vec<u8>, durable: Vec<u8>, unsynced: Vec<Write> },
    Folder { live: BTreeMap<String, usize>, durable: BTreeMap<String, usize> },
}

impl Node {
    fn folder() -> Self {
        Self::Folder { live: BTreeMap::new(), durable: BTreeMap::new() }
    }
}

/// Names that change together: folder, name, and what it names from then on.
type Names = Vec<(usize, String, Option<usize>)>;

#[derive(Debug, Clone)]
struct State {
    nodes: Vec<Node>,
    unsynced: Vec<Names>,
    calls: usize,
    struck: Option<Call>,
    fault: Fault,
    random: Random,
}

/// A file system with the folder `/fake`.
#[derive(Debug)]
pub struct Fake(Arc<Mutex<State>>);

#[derive(Debug)]
struct Open {
    state: Arc<Mutex<State>>,
    node: usize,
}

/// Everything below a folder: a file's bytes, or none for a folder.
pub type Tree = BTreeMap<String, Option<Vec<u8>>>;

impl Fake {
    pub fn new(seed: u64) -> Self {
        let state = State {
            nodes: vec![Node::folder()],
            unsynced: Vec::new(),
            calls: 0,
            struck: None,
            fault: Fault::None,
            random: Random::new(seed),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The same file system with everything on the disk, where the next calls are counted anew and meet `fault`.
    pub fn with(&self, fault: Fault, seed: u64) -> Self {
        let mut state = self.lock().clone();
        (state.fault, state.calls, state.struck, state.random) = (fault, 0, None, Random::new(seed));
        state.settle();
        Self(Arc::new(Mutex::new(state)))
    }

    /// What is found after a loss of power.
    pub fn after_power_loss(&self, seed: u64) -> Self {
        let mut state = self.lock().clone();
        state.lose_power(&mut Random::new(seed));
        Self(Arc::new(Mutex::new(state))).with(Fault::None, seed)
    }

    /// How many calls were made.
    pub fn calls(&self) -> usize {
        self.lock().calls
    }

    /// What the call that failed first was for.
    pub fn struck(&self) -> Option<Call> {
        self.lock().struck
    }

    /// Everything below `folder`; nothing if it is not there.
    pub fn tree(&self, folder: &str) -> Tree {
        let state = self.lock();
        let mut tree = Tree::new();
        if let Ok(node) = state.find(Path::new(folder)) {
            state.collect(node, "", &mut tree);
        }
        tree
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn call(&self, call: Call) -> Result<MutexGuard<'_, State>> {
        State::call(&self.0, call)
    }
}

impl State {
    /// Counts a call, and lets it fail where a fault says so.
    fn call(state: &Mutex<Self>, call: Call) -> Result<MutexGuard<'_, Self>> {
        let mut state = state.lock().unwrap();
        state.calls += 1;
        let struck = match state.fault {
            Fault::End(at) => (state.calls >= at).then(|| Error::other("the process has ended")),
            Fault::Once(at, number) => (state.calls == at).then(|| Error::from_raw_os_error(number)),
            Fault::From(at, number) => {
                (state.calls >= at && call == Call::Change).then(|| Error::from_raw_os_error(number))
            }
            Fault::None | Fault::Flip(_) => None,
        };
        if let Some(error) = struck {
            state.struck.get_or_insert(call);
            return Err(error);
        }
        Ok(state)
    }

    fn find(&self, path: &Path) -> Result<usize> {
        let below = path.strip_prefix("/fake").unwrap_or_else(|_| panic!("{} is none of ours", path.display()));
        let mut node = 0;
        for part in below.components() {
            assert!(matches!(part, Component::Normal(_)), "{} is not plain", path.display());
            let Node::Folder { live, .. } = &self.nodes[node] else { return Err(ErrorKind::NotADirectory.into()) };
            node = *live.get(part.as_os_str().to_str().unwrap()).ok_or(ErrorKind::NotFound)?;
        }
        Ok(node)
    }

    /// The folder and the name of a path.
    fn place(&self, path: &Path) -> Result<(usize, String)> {
        let folder = self.find(path.parent().unwrap())?;
        let Node::Folder { .. } = self.nodes[folder] else { return Err(ErrorKind::NotADirectory.into()) };
        Ok((folder, path.file_name().unwrap().to_str().unwrap().to_owned()))
    }

    fn folder(&mut self, folder: usize) -> (&mut BTreeMap<String, usize>, &mut BTreeMap<String, usize>) {
        match &mut self.nodes[folder] {
            Node::Folder { live, durable } => (live, durable),
            Node::File { .. } => panic!("not a folder"),
        }
    }

    /// Changes names for every process at once, and for the disk some day.
    fn name(&mut self, names: Names) {
        for (folder, name, node) in &names {
            set(self.folder(*folder).0, name, *node);
        }
        self.unsynced.push(names);
    }

    fn make(&mut self, path: &Path, node: Node) -> Result<usize> {
        let (folder, name) = self.place(path)?;
        if self.folder(folder).0.contains_key(&name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.nodes.push(node);
        let made = self.nodes.len() - 1;
        self.name(vec![(folder, name, Some(made))]);
        Ok(made)
    }

    /// Puts a change of names on the disk. Nothing has two names there, even if what took the first away is lost.
    fn keep(&mut self, names: &Names) {
        for (folder, name, node) in names {
            for other in &mut self.nodes {
                if let Node::Folder { durable, .. } = other {
                    durable.retain(|_, named| Some(*named) != *node);
                }
            }
            set(self.folder(*folder).1, name, *node);
        }
    }

    /// Puts on the disk what is not there yet.
    fn settle(&mut self) {
        self.unsynced.clear();
        for node in &mut self.nodes {
            match node {
                Node::Folder { live, durable } => durable.clone_from(live),
                Node::File { live, durable, unsynced } => {
                    unsynced.clear();
                    durable.clone_from(live);
                }
            }
        }
    }

    fn lose_power(&mut self, random: &mut Random) {
        // All is kept, nothing, or each with a chance of a half; in the order of the calls or not.
        let share = [0, 1, 1, 2][random.below(4)];
        let mut names = std::mem::take(&mut self.unsynced);
        names.retain(|_| random.below(2) < share);
        if random.below(2) == 0 {
            reorder(&mut names, random);
        }
        for names in &names {
            self.keep(names);
        }
        for node in &mut self.nodes {
            match node {
                Node::Folder { live, durable } => live.clone_from(durable),
                Node::File { live, durable, unsynced } => {
                    let mut kept = std::mem::take(unsynced);
                    let share = [0, 1, 1, 2][random.below(4)];
                    kept.retain(|_| random.below(2) < share);
                    if random.below(2) == 0 {
                        random.shuffle(&mut kept);
                    }
                    for write in kept {
                        let whole = random.below(3) > 0;
                        if whole { write.apply(durable) } else { write.torn(random).apply(durable) }
                    }
                    live.clone_from(durable);
                }
            }
        }
    }

    fn collect(&self, node: usize, prefix: &str, tree: &mut Tree) {
        let Node::Folder { live, .. } = &self.nodes[node] else { return };
        for (name, node) in live {
            let path = format!("{prefix}{name}");
            let bytes = if let Node::File { live, .. } = &self.nodes[*node] { Some(live.clone()) } else { None };
            tree.insert(path.clone(), bytes);
            self.collect(*node, &format!("{path}/"), tree);
        }
    }

    fn is_file(&self, node: usize) -> bool {
        matches!(self.nodes[node], Node::File { .. })
    }

    fn remove(&mut self, path: &Path, file: bool) -> Result<()> {
        let node = self.find(path)?;
        match &self.nodes[node] {
            Node::File { .. } if file => {}
            Node::Folder { live, .. } if !file && live.is_empty() => {}
            Node::Folder { .. } if !file => return Err(ErrorKind::DirectoryNotEmpty.into()),
            _ => return Err(ErrorKind::InvalidInput.into()),
        }
        let (folder, name) = self.place(path)?;
        self.name(vec![(folder, name, None)]);
        Ok(())
    }

    fn open(&mut self, node: usize) -> (&mut Vec<u8>, &mut Vec<u8>, &mut Vec<Write>) {
        match &mut self.nodes[node] {
            Node::File { live, durable, unsynced } => (live, durable, unsynced),
            Node::Folder { .. } => panic!("not a file"),
        }
    }

    fn write(&mut self, node: usize, write: Write) {
        let (live, _, unsynced) = self.open(node);
        write.apply(live);
        unsynced.push(write);
    }
}

/// Exchanges neighbours at random that have neither a name nor what is named in common; no disk exchanges others.
fn reorder(changes: &mut [Names], random: &mut Random) {
    let alike = |a: &Names, b: &Names| {
        a.iter().any(|(folder, name, node)| {
            b.iter().any(|other| (folder, name) == (&other.0, &other.1) || node.is_some() && *node == other.2)
        })
    };
    for _ in 0..changes.len() {
        for second in 1..changes.len() {
            let (first, rest) = changes.split_at_mut(second);
            if random.below(2) == 0 && !alike(&first[second - 1], &rest[0]) {
                std::mem::swap(&mut first[second - 1], &mut rest[0]);
            }
        }
    }
}

fn set(names: &mut BTreeMap<String, usize>, name: &str, node: Option<usize>) {
    match node {
        Some(node) => names.insert(name.to_owned(), node),
        None => names.remove(name),
    };
}
