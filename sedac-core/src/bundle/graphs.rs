//! Checks every graph against the manifest before anything is allocated by it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use prost::Message;

use super::gate::Gate;
use super::manifest::{
    ContextTensor, DrafterEntry, KeyValueEntry, LayerEntry, Manifest, is_graph_name,
};
use super::onnx::{OnnxModel, Tensor, ValueInfo};
use crate::error::{Error, Result};

const FLOAT: i32 = 1;
const INT32: i32 = 6;
const INT64: i32 = 7;
const BOOL: i32 = 9;

/// What is known of a bundle's graphs, by file.
pub(super) type Graphs = BTreeMap<PathBuf, GraphFacts>;

/// What a graph needs beside itself.
#[derive(Debug, Clone)]
pub(super) struct GraphFacts {
    /// Bytes that it takes once loaded, its weights included and in fp32.
    pub(super) bytes: u64,
    /// Bytes that it takes where it is computed in the precision of its weights.
    pub(super) stored_bytes: u64,
    /// The files that hold its weights.
    pub(super) data: BTreeSet<PathBuf>,
}

/// Check that every engine's graph is the one that the manifest means, takes and gives tensors of
/// the manifest's sizes, and keeps its weights in checked files. Of a bundle that is not
/// `is_current`, but of an older schema, only the latter.
///
/// # Errors
/// [`Error::Bundle`] naming the graph and what is wrong with it.
pub(super) fn check(gate: &Gate, manifest: &Manifest, is_current: bool) -> Result<Graphs> {
    let mut check = Check {
        gate,
        manifest,
        graphs: Graphs::new(),
    };
    for file in manifest.files.keys() {
        if is_graph_name(file) && gate.lists(file) {
            check.weights(file)?;
        }
    }
    if is_current {
        check.engines()?;
    }
    Ok(check.graphs)
}

/// The name of an engine of consecutive layers: of `one`, or of `several`.
fn blocks(one: &str, several: &str, entry: &LayerEntry) -> String {
    let first = entry.first_layer;
    match entry.num_layers {
        1 => format!("{one}_{first:03}"),
        _ => format!("{several}_{first:03}_{:03}", entry.end() - 1),
    }
}

/// An axis: a size, or open.
type Axis = Option<u64>;

/// Token ids and position ids.
const IDS: [Axis; 2] = [Some(1), None];

struct Check<'a> {
    gate: &'a Gate,
    manifest: &'a Manifest,
    graphs: Graphs,
}

impl Check<'_> {
    fn engines(&self) -> Result<()> {
        let engines = &self.manifest.engines;
        self.embed(&engines.embed)?;
        if let Some(contexts) = &engines.contexts {
            self.contexts(contexts)?;
        }
        for entry in &engines.layers {
            self.layers(entry, &blocks("layer", "block", entry))?;
        }
        for entry in &engines.attention {
            self.layers(entry, &blocks("attention", "attention", entry))?;
        }
        self.layers(&engines.monolith, "monolith")?;
        for (layer, entry) in engines.key_value.iter().enumerate() {
            self.key_value(layer, entry)?;
        }
        for entry in &engines.exits {
            self.exit(entry.depth, &entry.file)?;
            if let Some(lens) = &entry.lens {
                self.lens(entry.depth, lens)?;
            }
        }
        if let Some(entry) = &self.manifest.drafter {
            self.drafter(entry)?;
        }
        self.head(&engines.head)
    }

    fn drafter(&self, entry: &DrafterEntry) -> Result<()> {
        let graph = self.open(&entry.state, "draft_state")?;
        let size = self.manifest.model.hidden_size as u64;
        let features = size * entry.feature_layers.len() as u64;
        graph.takes("features", FLOAT, &[Some(1), None, Some(features)])?;
        graph.gives("state", FLOAT, &self.hidden())?;
        let graph = self.open(&entry.file, "draft")?;
        for name in ["state", "embedding"] {
            graph.takes(name, FLOAT, &self.hidden())?;
        }
        graph.takes("position_ids", INT64, &IDS)?;
        let row = Some(entry.key_value_size as u64);
        for kind in ["key", "value"] {
            graph.takes(&format!("past_{kind}"), FLOAT, &[Some(1), None, row])?;
            graph.gives(&format!("new_{kind}"), FLOAT, &[Some(1), None, row])?;
        }
        let one = |size: u64| [Some(1), Some(1), Some(size)];
        graph.gives("next_state", FLOAT, &one(size))?;
        graph.gives("logits", FLOAT, &one(entry.tokens.len() as u64))
    }

    fn embed(&self, file: &Path) -> Result<()> {
        let graph = self.open(file, "embed")?;
        graph.takes("input_ids", INT64, &IDS)?;
        graph.gives("x", FLOAT, &self.hidden())
    }

    fn contexts(&self, file: &Path) -> Result<()> {
        let graph = self.open(file, "contexts")?;
        graph.takes("position_ids", INT64, &IDS)?;
        for context in &self.manifest.contexts {
            let (element, axes) = graph.context(context)?;
            graph.gives(&context.name, element, &axes)?;
        }
        Ok(())
    }

    fn layers(&self, entry: &LayerEntry, name: &str) -> Result<()> {
        let graph = self.open(&entry.file, name)?;
        graph.takes("x", FLOAT, &self.hidden())?;
        graph.takes("seqlens_k", INT32, &[Some(1)])?;
        graph.takes("total_sequence_length", INT32, &[])?;
        self.takes_contexts(&graph, &entry.contexts)?;
        graph.gives("y", FLOAT, &self.hidden())?;
        let layers = entry.num_layers as u64;
        graph.gives("stability", FLOAT, &[Some(1), None, Some(layers)])?;
        for index in 0..entry.num_layers {
            self.cache(&graph, entry.first_layer + index, index)?;
        }
        if entry.risk {
            graph.gives("risk", FLOAT, &[Some(1), None, Some(1)])?;
        }
        Ok(())
    }

    fn key_value(&self, layer: usize, entry: &KeyValueEntry) -> Result<()> {
        let graph = self.open(&entry.file, &format!("kv_{layer:03}"))?;
        graph.takes("x", FLOAT, &self.hidden())?;
        graph.takes("write_index", INT64, &[Some(1)])?;
        self.takes_contexts(&graph, &entry.contexts)?;
        self.cache(&graph, layer, 0)
    }

    fn exit(&self, depth: usize, file: &Path) -> Result<()> {
        let graph = self.open(file, &format!("exit_{depth:03}"))?;
        graph.takes("x", FLOAT, &self.hidden())?;
        graph.takes("stability", FLOAT, &[Some(1), None, Some(3)])?;
        graph.gives("signals", FLOAT, &[Some(1), None, Some(3)])
    }

    fn lens(&self, depth: usize, file: &Path) -> Result<()> {
        let graph = self.open(file, &format!("lens_{depth:03}"))?;
        graph.takes("x", FLOAT, &self.hidden())?;
        graph.gives("y", FLOAT, &self.hidden())
    }

    fn head(&self, file: &Path) -> Result<()> {
        let graph = self.open(file, "head")?;
        graph.takes("x", FLOAT, &self.hidden())?;
        let vocabulary = self.manifest.model.vocab_size as u64;
        graph.gives("logits", FLOAT, &[Some(1), None, Some(vocabulary)])
    }

    fn hidden(&self) -> [Axis; 3] {
        [Some(1), None, Some(self.manifest.model.hidden_size as u64)]
    }

    fn takes_contexts(&self, graph: &OpenGraph, names: &[String]) -> Result<()> {
        let known = self.manifest.contexts.iter();
        for context in known.filter(|context| names.contains(&context.name)) {
            let (element, axes) = graph.context(context)?;
            graph.takes(&context.name, element, &axes)?;
        }
        Ok(())
    }

    fn cache(&self, graph: &OpenGraph, layer: usize, index: usize) -> Result<()> {
        let geometry = self.manifest.key_value_heads[layer];
        let (heads, size) = (geometry.heads as u64, geometry.head_size as u64);
        let axes = [Some(1), Some(heads), None, Some(size)];
        for kind in ["key", "value"] {
            graph.takes(&format!("past_{kind}_{index}"), FLOAT, &axes)?;
            graph.gives(&format!("present_{kind}_{index}"), FLOAT, &axes)?;
        }
        Ok(())
    }

    /// Read the graph in `file`, which must call itself `name`.
    fn open(&self, file: &Path, name: &str) -> Result<OpenGraph> {
        let graph = OpenGraph::read(self.gate, file)?;
        let own = graph.model.graph.as_ref().map_or("", |graph| &graph.name);
        if own != name {
            let reason = format!("the graph {own:?} where bundle.json means {name:?}");
            return Err(graph.wrong(&reason));
        }
        Ok(graph)
    }

    /// Check where the graph in `file` has its weights.
    fn weights(&mut self, file: &Path) -> Result<()> {
        let graph = OpenGraph::read(self.gate, file)?;
        let own = self.gate.bytes(file).unwrap_or(0);
        let mut facts = GraphFacts {
            bytes: own,
            stored_bytes: own,
            data: BTreeSet::new(),
        };
        for tensor in graph.model.external_tensors() {
            let (data, stored) = self.weight(&graph, file, tensor)?;
            let loaded = match tensor.element_bits() {
                Some(16) => stored.saturating_mul(2),
                _ => stored,
            };
            facts.data.insert(data);
            facts.bytes = facts.bytes.saturating_add(loaded);
            facts.stored_bytes = facts.stored_bytes.saturating_add(stored);
        }
        self.graphs.insert(file.to_owned(), facts);
        Ok(())
    }

    /// The file that an external tensor is in, and its bytes there.
    fn weight(&self, graph: &OpenGraph, file: &Path, tensor: &Tensor) -> Result<(PathBuf, u64)> {
        let name = &tensor.name;
        let parsed = || {
            let number = |key| tensor.external(key)?.parse::<u64>().ok();
            let location = tensor.external("location")?;
            let bits = tensor.elements()?.checked_mul(tensor.element_bits()?)?;
            Some((location, number("offset")?, number("length")?, bits))
        };
        let Some((location, offset, length, bits)) = parsed() else {
            return Err(graph.wrong(&format!("weight {name} has no place or no size")));
        };
        let data = file.with_file_name(location);
        let is_weights = location_is_name(location) && !self.manifest.is_for_devices(&data);
        let (Some(bytes), true) = (self.gate.bytes(&data), is_weights) else {
            let reason =
                format!("weight {name} is in {location:?}, which bundle.json does not list");
            return Err(graph.wrong(&reason));
        };
        let fits = offset.checked_add(length).is_some_and(|end| end <= bytes);
        if !fits || length != bits.div_ceil(8) {
            let reason = format!("weight {name} of {length} bytes does not fit its place or shape");
            return Err(graph.wrong(&reason));
        }
        Ok((data, length))
    }
}

/// Whether `location` is a bare file name, beside the graph.
fn location_is_name(location: &str) -> bool {
    Path::new(location).file_name() == Some(location.as_ref())
}

struct OpenGraph {
    path: PathBuf,
    model: OnnxModel,
}

impl OpenGraph {
    fn read(gate: &Gate, file: &Path) -> Result<Self> {
        let path = gate.shown(file);
        let model = OnnxModel::decode(&*gate.read(file)?)
            .map_err(|error| wrong(&path, &format!("not an ONNX graph ({error})")))?;
        Ok(Self { path, model })
    }

    fn takes(&self, name: &str, element: i32, axes: &[Axis]) -> Result<()> {
        let inputs = self.model.graph.as_ref().map(|graph| &graph.input);
        self.holds("input", inputs, name, element, axes)
    }

    fn gives(&self, name: &str, element: i32, axes: &[Axis]) -> Result<()> {
        let outputs = self.model.graph.as_ref().map(|graph| &graph.output);
        self.holds("output", outputs, name, element, axes)
    }

    fn holds(
        &self,
        kind: &str,
        values: Option<&Vec<ValueInfo>>,
        name: &str,
        element: i32,
        axes: &[Axis],
    ) -> Result<()> {
        let mut values = values.into_iter().flatten();
        let value = values.find(|value| value.name == name);
        let Some((own_element, own_axes)) = value.and_then(ValueInfo::tensor) else {
            return Err(self.wrong(&format!("there is no {kind} {name}")));
        };
        if own_element == element && own_axes == axes {
            return Ok(());
        }
        Err(self.wrong(&format!(
            "{kind} {name} is {} where bundle.json asks for {}",
            describe(own_element, &own_axes),
            describe(element, axes),
        )))
    }

    /// The element type and axes of `context` in graphs.
    fn context(&self, context: &ContextTensor) -> Result<(i32, Vec<Axis>)> {
        let element = match context.dtype.as_str() {
            "float32" => FLOAT,
            "int64" => INT64,
            "int32" => INT32,
            "bool" => BOOL,
            other => {
                let name = &context.name;
                return Err(self.wrong(&format!("context {name} has the unknown dtype {other}")));
            }
        };
        let axes = context.shape.iter().map(|&size| u64::try_from(size).ok());
        Ok((element, axes.collect()))
    }

    fn wrong(&self, reason: &str) -> Error {
        wrong(&self.path, reason)
    }
}

fn describe(element: i32, axes: &[Axis]) -> String {
    let sizes = axes
        .iter()
        .map(|axis| axis.map_or("?".into(), |size| size.to_string()));
    let element = match element {
        FLOAT => "float32",
        INT32 => "int32",
        INT64 => "int64",
        BOOL => "bool",
        _ => "of another type",
    };
    format!("{element} [{}]", sizes.collect::<Vec<_>>().join(", "))
}

fn wrong(path: &Path, reason: &str) -> Error {
    Error::bundle(path, format!("{reason}; build the bundle again"))
}
