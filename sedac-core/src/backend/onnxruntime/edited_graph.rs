//! ONNX graphs that are changed as they are loaded.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;

use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};

use super::operator::{CustomOperator, DOMAIN};
use crate::bundle::onnx::ValueInfo;

/// An ONNX file whose parts that stay as they are are not read.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Model {
    #[prost(int64, tag = "1")]
    pub(super) ir_version: i64,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub(super) opset_import: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "7")]
    pub(super) graph: Option<EditedGraph>,
    #[prost(bytes = "vec", repeated, tag = "25")]
    pub(super) functions: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct EditedGraph {
    #[prost(message, repeated, tag = "1")]
    pub(super) node: Vec<Operator>,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub(super) initializer: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "11")]
    pub(super) input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    pub(super) output: Vec<ValueInfo>,
    #[prost(bytes = "vec", repeated, tag = "15")]
    pub(super) sparse_initializer: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Operator {
    #[prost(string, repeated, tag = "1")]
    pub(super) input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(super) output: Vec<String>,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(string, tag = "4")]
    pub(super) op_type: String,
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub(super) attribute: Vec<Vec<u8>>,
    #[prost(string, tag = "7")]
    pub(super) domain: String,
    #[prost(string, tag = "8")]
    pub(super) overload: String,
}

/// An attribute that is an integer.
#[derive(Clone, PartialEq, Message)]
struct IntegerAttribute {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, optional, tag = "3")]
    i: Option<i64>,
    #[prost(int32, tag = "20")]
    r#type: i32,
}

/// The type of attributes that are integers.
const INT: i32 = 2;

/// An attribute that is integers, or graphs.
#[derive(Clone, PartialEq, Message)]
struct OtherAttribute {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", optional, tag = "6")]
    g: Option<Vec<u8>>,
    #[prost(int64, repeated, tag = "8")]
    ints: Vec<i64>,
    #[prost(bytes = "vec", repeated, tag = "11")]
    graphs: Vec<Vec<u8>>,
}

/// The domains of operators.
pub(super) const ONNX: &str = "";
pub(super) const MICROSOFT: &str = "com.microsoft";

/// What is said of a stored tensor, without its numbers.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Stored {
    #[prost(int64, repeated, tag = "1")]
    pub(super) dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub(super) data_type: i32,
    #[prost(string, tag = "8")]
    pub(super) name: String,
}

/// An entry of `opset_import`.
#[derive(Clone, PartialEq, Message)]
struct OperatorSet {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

impl Model {
    /// The ONNX file `file`. What is not of the type that its field has is left out, as ONNX Runtime does.
    pub(super) fn of_file(file: &[u8]) -> Option<Self> {
        let (mut known, mut rest) = (Vec::new(), file);
        while !rest.is_empty() {
            let field = rest;
            let (tag, given) = decode_key(&mut rest).ok()?;
            skip_field(given, tag, &mut rest, DecodeContext::default()).ok()?;
            let expected = match tag {
                1 => WireType::Varint,
                _ => WireType::LengthDelimited,
            };
            if given == expected {
                known.extend_from_slice(&field[..field.len() - rest.len()]);
            }
        }
        Self::decode(&*known).ok()
    }

    /// Say that nodes may be the chain's own operators.
    pub(super) fn import_own_operators(&mut self) {
        let domain = OperatorSet {
            domain: in_text(DOMAIN),
            version: 1,
        };
        self.opset_import.push(domain.encode_to_vec());
    }
}

fn in_text(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

impl Operator {
    /// Whether it is the operator `op_type` of `domain`.
    pub(super) fn is(&self, domain: &str, op_type: &str) -> bool {
        let own = match &*self.domain {
            "ai.onnx" => ONNX,
            domain => domain,
        };
        own == domain && self.op_type == op_type
    }

    pub(super) fn is_attention(&self) -> bool {
        self.is(MICROSOFT, "GroupQueryAttention")
    }

    /// Whether it gives a matrix's transpose, if it is a Transpose.
    pub(super) fn transposes(&self) -> bool {
        let mut attributes = self.attribute.iter();
        attributes.all(|bytes| {
            OtherAttribute::decode(&**bytes)
                .is_ok_and(|attribute| attribute.name == "perm" && attribute.ints == [1, 0])
        })
    }

    fn has_subgraph(&self) -> bool {
        let mut attributes = self.attribute.iter();
        attributes.any(|bytes| {
            !OtherAttribute::decode(&**bytes)
                .is_ok_and(|attribute| attribute.g.is_none() && attribute.graphs.is_empty())
        })
    }

    /// Make it the chain's own operator `T`.
    pub(super) fn make<T: CustomOperator>(&mut self) {
        self.op_type = in_text(T::NAME);
        self.domain = in_text(DOMAIN);
    }

    pub(super) fn integer(&self, name: &str) -> Option<usize> {
        let attributes = self.attribute.iter();
        let mut attributes = attributes.filter_map(|bytes| IntegerAttribute::decode(&**bytes).ok());
        let attribute = attributes.find(|attribute| attribute.name == name)?;
        usize::try_from(attribute.i?).ok()
    }

    /// Whether its attributes are some of `names`.
    pub(super) fn has_attributes(&self, names: &[&str]) -> bool {
        let mut attributes = self.attribute.iter();
        attributes.all(|bytes| {
            IntegerAttribute::decode(&**bytes).is_ok_and(|of| names.contains(&&*of.name))
        })
    }

    /// Add the attribute `name`.
    pub(super) fn set_integer(&mut self, name: &CStr, number: usize) {
        let attribute = IntegerAttribute {
            name: in_text(name),
            i: Some(number as i64),
            r#type: INT,
        };
        self.attribute.push(attribute.encode_to_vec());
    }
}

impl EditedGraph {
    /// What of it makes `outputs`.
    pub(super) fn piece(&self, outputs: &[&ValueInfo]) -> Self {
        let mut wanted: HashSet<_> = outputs.iter().map(|value| &value.name).collect();
        let mut nodes = Vec::new();
        // they are in the order in which they run
        for node in self.node.iter().rev() {
            let mut outputs = node.output.iter().filter(|name| !name.is_empty());
            if outputs.any(|name| wanted.contains(name)) {
                wanted.extend(&node.input);
                nodes.push(node.clone());
            }
        }
        nodes.reverse();
        let inputs = self.input.iter();
        let inputs = inputs.filter(|value| wanted.contains(&value.name));
        let initializers = self.initializer.iter().filter(|tensor| {
            Stored::decode(&***tensor).is_ok_and(|stored| wanted.contains(&stored.name))
        });
        Self {
            node: nodes,
            name: self.name.clone(),
            initializer: initializers.cloned().collect(),
            input: inputs.cloned().collect(),
            output: outputs.iter().copied().cloned().collect(),
            sparse_initializer: Vec::new(),
        }
    }

    /// Whether nodes have graphs of their own, which may read any value.
    pub(super) fn has_subgraphs(&self) -> bool {
        self.node.iter().any(Operator::has_subgraph)
    }

    /// Remove the nodes that give one of `values`, and what they alone read, as far as nothing reads it.
    pub(super) fn remove_unread(&mut self, mut values: Vec<String>) {
        let mut readers: HashMap<String, usize> = HashMap::new();
        let outputs = self.output.iter().map(|output| &output.name);
        for name in self.node.iter().flat_map(|node| &node.input).chain(outputs) {
            *readers.entry(name.clone()).or_default() += 1;
        }
        let givers = self.node.iter().enumerate();
        let givers = givers.filter(|(_, node)| node.output.len() == 1);
        let givers: HashMap<_, _> = givers
            .map(|(index, node)| (node.output[0].clone(), index))
            .collect();
        let mut removed = HashSet::new();
        while let Some(value) = values.pop() {
            let is_read = readers.get(&value).is_some_and(|&readers| readers > 0);
            let Some(&index) = givers.get(&value).filter(|_| !is_read) else {
                continue;
            };
            if removed.insert(index) {
                for name in &self.node[index].input {
                    readers
                        .entry(name.clone())
                        .and_modify(|readers| *readers -= 1);
                    values.push(name.clone());
                }
            }
        }
        let mut index = 0;
        self.node.retain(|_| {
            index += 1;
            !removed.contains(&(index - 1))
        });
    }
}

/// Graphs as tests write them.
#[cfg(test)]
pub(super) mod examples {
    use super::*;

    /// A node with the inputs and outputs named, "-" for one that is left out.
    pub(in super::super) fn operator(op_type: &str, inputs: &str, outputs: &str) -> Operator {
        let names = |names: &str| names.split(' ').map(|name| name.replace('-', "")).collect();
        Operator {
            input: names(inputs),
            output: names(outputs),
            op_type: op_type.into(),
            domain: match op_type {
                "GroupQueryAttention" | "MatMulNBits" | "FusedMatMul" => MICROSOFT.into(),
                _ => ONNX.into(),
            },
            ..Operator::default()
        }
    }

    /// A node with a graph of its own.
    pub(in super::super) fn with_subgraph() -> Operator {
        let graph = OtherAttribute {
            name: "then_branch".into(),
            g: Some(Vec::new()),
            ..OtherAttribute::default()
        };
        let mut node = operator("If", "condition", "z");
        node.attribute.push(graph.encode_to_vec());
        node
    }

    /// The stored tensor `name`, without its numbers.
    pub(in super::super) fn stored(name: &str, data_type: i32, dims: &[i64]) -> Vec<u8> {
        let stored = Stored {
            dims: dims.to_vec(),
            data_type,
            name: name.into(),
        };
        stored.encode_to_vec()
    }

    /// A line for each node of `model`.
    pub(in super::super) fn lines(model: &Model) -> Vec<String> {
        let nodes = &model.graph.as_ref().unwrap().node;
        let line = |node: &Operator| {
            let (inputs, outputs) = (node.input.join(" "), node.output.join(" "));
            format!("{} {inputs}: {outputs}", node.op_type)
        };
        nodes.iter().map(line).collect()
    }
}
