//! Layer graphs whose rows may be of several sequences.
//!
//! All of a layer but attention computes row by row. A layer's graph, for rows [1, rows, hidden], is
//! changed around attention only: where it is given the lengths of n sequences, attention takes the
//! rows as n sequences of as many rows each, with caches [n, heads, positions, head size].

use std::collections::HashMap;

use prost::Message;

use crate::bundle::onnx::{TensorType, Type, ValueInfo};

/// The shape of attention's rows, [sequences, rows of each, as wide as they are].
const ROWS: &str = "sedac_rows_of_sequences";
/// The shape of their positions, [sequences, rows of each].
const POSITIONS: &str = "sedac_positions_of_sequences";
/// The shape of rows outside of attention.
const TOGETHER: &str = "sedac_rows_together";
/// Axes after the sequences in these shapes.
const ROWS_TAIL: &str = "sedac_rows_of_sequences_tail";
const POSITIONS_TAIL: &str = "sedac_positions_of_sequences_tail";
const SEQUENCES: &str = "sedac_sequences";

/// Inputs of attention that have rows.
const ROW_INPUTS: [usize; 3] = [0, 1, 2];
/// Its input of positions.
const POSITION_INPUT: usize = 9;

const INT64: i32 = 7;

/// An ONNX file whose parts that stay as they are are not read.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Model {
    #[prost(int64, tag = "1")]
    pub(super) ir_version: i64,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub(super) opset_import: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "7")]
    pub(super) graph: Option<RowGraph>,
    #[prost(bytes = "vec", repeated, tag = "25")]
    pub(super) functions: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RowGraph {
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

/// A stored tensor of integers.
#[derive(Clone, PartialEq, Message)]
struct Integers {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(int64, repeated, tag = "7")]
    int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    name: String,
}

/// An attribute that is an integer.
#[derive(Clone, PartialEq, Message)]
pub(super) struct IntegerAttribute {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(int64, optional, tag = "3")]
    pub(super) i: Option<i64>,
    #[prost(int32, tag = "20")]
    pub(super) r#type: i32,
}

impl Operator {
    fn new(op_type: &str, inputs: &[&str], output: &str) -> Self {
        Self {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: vec![output.into()],
            name: output.into(),
            op_type: op_type.into(),
            ..Self::default()
        }
    }

    fn reshape(input: &str, shape: &str, output: &str) -> Self {
        Self::new("Reshape", &[input, shape], output)
    }

    pub(super) fn is_attention(&self) -> bool {
        self.op_type == "GroupQueryAttention"
    }
}

/// The layer graph `graph` with rows of several sequences. None where its attention is another
/// operator, or is given a spare row.
pub(super) fn of_sequences(graph: &[u8]) -> Option<Vec<u8>> {
    let mut model = Model::decode(graph).ok()?;
    let graph = model.graph.as_mut()?;
    if !graph.node.iter().any(Operator::is_attention) || has_spare_rows(&graph.node) {
        return None;
    }
    graph.input.iter_mut().for_each(open_sequences);
    graph.output.iter_mut().for_each(open_sequences);
    let attention = graph.node.iter().enumerate();
    let attention = attention.filter(|(_, node)| node.is_attention());
    let attention: Vec<_> = attention.map(|(index, _)| index).collect();
    let mut edits = Edits::default();
    for index in attention {
        edits.split_rows(index, &mut graph.node);
    }
    graph.node = edits.apply(std::mem::take(&mut graph.node));
    for (name, values) in [
        (ROWS_TAIL, &[-1, 0][..]),
        (POSITIONS_TAIL, &[-1]),
        (TOGETHER, &[1, -1, 0]),
    ] {
        let tensor = Integers {
            dims: vec![values.len() as i64],
            data_type: INT64,
            int64_data: values.to_vec(),
            name: name.into(),
        };
        graph.initializer.push(tensor.encode_to_vec());
    }
    Some(model.encode_to_vec())
}

/// Whether attention takes rows that were padded.
fn has_spare_rows(nodes: &[Operator]) -> bool {
    let padded = nodes.iter().filter(|node| node.op_type == "Pad");
    let padded: Vec<_> = padded.flat_map(|node| &node.output).collect();
    let mut attention = nodes.iter().filter(|node| node.is_attention());
    attention.any(|node| node.input.iter().any(|input| padded.contains(&input)))
}

/// Leave the number of sequences open in `value`, where it has one.
fn open_sequences(value: &mut ValueInfo) {
    let name = &value.name;
    let prefixes = ["seqlens_k", "past_", "present_"];
    if !prefixes.iter().any(|prefix| name.starts_with(prefix)) {
        return;
    }
    if let Some(Type {
        tensor_type: Some(TensorType {
            shape: Some(shape), ..
        }),
    }) = &mut value.r#type
        && let Some(first) = shape.dim.first_mut()
    {
        first.dim_value = None;
        first.dim_param = Some("sequences".into());
    }
}

/// Nodes to add beside those that there are, by their index.
#[derive(Default)]
struct Edits {
    before: HashMap<usize, Vec<Operator>>,
    after: HashMap<usize, Vec<Operator>>,
}

impl Edits {
    /// Have the attention at `index` take and give rows by sequence.
    fn split_rows(&mut self, index: usize, nodes: &mut [Operator]) {
        let node = &mut nodes[index];
        let rows = ROW_INPUTS.map(|input| (input, ROWS));
        for (input, shape) in rows.into_iter().chain([(POSITION_INPUT, POSITIONS)]) {
            let Some(value) = node.input.get_mut(input).filter(|value| !value.is_empty()) else {
                continue;
            };
            let split = format!("{value}_of_sequences_{index}_{input}");
            let reshape = Operator::reshape(value, shape, &split);
            self.before.entry(index).or_default().push(reshape);
            *value = split;
        }
        let together = node.output[0].clone();
        let split = format!("{together}_of_sequences");
        node.output[0].clone_from(&split);
        let reshape = Operator::reshape(&split, TOGETHER, &together);
        self.after.entry(index).or_default().push(reshape);
    }

    /// `nodes` with what was added, after the shapes that it takes.
    fn apply(mut self, nodes: Vec<Operator>) -> Vec<Operator> {
        let axis = IntegerAttribute {
            name: "axis".into(),
            i: Some(0),
            r#type: 2,
        };
        let mut all = vec![Operator::new("Shape", &["seqlens_k"], SEQUENCES)];
        for (shape, tail) in [(ROWS, ROWS_TAIL), (POSITIONS, POSITIONS_TAIL)] {
            let mut concat = Operator::new("Concat", &[SEQUENCES, tail], shape);
            concat.attribute.push(axis.encode_to_vec());
            all.push(concat);
        }
        for (index, node) in nodes.into_iter().enumerate() {
            all.extend(self.before.remove(&index).into_iter().flatten());
            all.push(node);
            all.extend(self.after.remove(&index).into_iter().flatten());
        }
        all
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
            ..Operator::default()
        }
    }

    /// A line for each node of the ONNX file `graph`.
    pub(in super::super) fn lines(graph: &[u8]) -> Vec<String> {
        let nodes = Model::decode(graph).unwrap().graph.unwrap().node;
        let line = |node: &Operator| {
            let (inputs, outputs) = (node.input.join(" "), node.output.join(" "));
            format!("{} {inputs}: {outputs}", node.op_type)
        };
        nodes.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::onnx::{Dimension, Shape};

    fn value(name: &str, sizes: &[i64]) -> ValueInfo {
        let dim = sizes.iter().map(|&size| Dimension {
            dim_value: (size > 0).then_some(size),
            dim_param: None,
        });
        let shape = Some(Shape { dim: dim.collect() });
        ValueInfo {
            name: name.into(),
            r#type: Some(Type {
                tensor_type: Some(TensorType {
                    elem_type: 1,
                    shape,
                }),
            }),
        }
    }

    fn model(node: Vec<Operator>) -> Vec<u8> {
        let graph = RowGraph {
            node,
            name: "layer_000".into(),
            input: vec![value("x", &[1, 0, 8]), value("seqlens_k", &[1])],
            output: vec![value("present_key_0", &[1, 2, 0, 4])],
            ..RowGraph::default()
        };
        let model = Model {
            ir_version: 10,
            opset_import: vec![vec![16, 23]],
            graph: Some(graph),
            functions: Vec::new(),
        };
        model.encode_to_vec()
    }

    fn attention(query: &str) -> Operator {
        let inputs = [query, "key", "", "past_key_0", "past_value_0", "seqlens_k"];
        Operator::new("GroupQueryAttention", &inputs, "attended")
    }

    /// The graph of `node` with rows of several sequences.
    fn graph_of(node: Vec<Operator>) -> RowGraph {
        let changed = of_sequences(&model(node)).unwrap();
        Model::decode(&*changed).unwrap().graph.unwrap()
    }

    /// The operators and what they take and give, after the three that make shapes.
    fn operators(graph: &RowGraph) -> Vec<String> {
        let nodes = graph.node[3..].iter();
        nodes
            .map(|node| format!("{} {} {}", node.op_type, node.input[0], node.output[0]))
            .collect()
    }

    #[test]
    fn attention_takes_rows_by_sequence() {
        let norm = Operator::new("Norm", &["x"], "query");
        let product = Operator::new("MatMul", &["attended"], "y");
        let graph = graph_of(vec![norm, attention("query"), product]);
        assert_eq!(
            operators(&graph),
            [
                "Norm x query",
                "Reshape query query_of_sequences_1_0",
                "Reshape key key_of_sequences_1_1",
                "GroupQueryAttention query_of_sequences_1_0 attended_of_sequences",
                "Reshape attended_of_sequences attended",
                "MatMul attended y",
            ]
        );
        assert_eq!(graph.node[6].input[2], "", "what is left out stays so");
        let sizes = |value: &ValueInfo| value.tensor().unwrap().1;
        assert_eq!(sizes(&graph.input[0]), [Some(1), None, Some(8)]);
        assert_eq!(sizes(&graph.input[1]), [None]);
        assert_eq!(sizes(&graph.output[0]), [None, Some(2), None, Some(4)]);
        assert_eq!(graph.initializer.len(), 3);
    }

    #[test]
    fn attention_with_a_spare_row_has_rows_of_one_sequence() {
        let padding = Operator::new("Pad", &["query", "pads"], "padded");
        let cut = Operator::new("Pad", &["attended", "cut"], "result");
        let graph = model(vec![padding, attention("padded"), cut]);
        assert_eq!(of_sequences(&graph), None);
    }

    #[test]
    fn other_attention_has_rows_of_one_sequence() {
        let node = Operator::new("Attention", &["x"], "y");
        assert_eq!(of_sequences(&model(vec![node])), None);
    }
}
