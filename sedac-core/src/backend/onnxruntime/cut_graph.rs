//! Layer graphs cut around attention.
//!
//! ONNX Runtime's attention refuses several rows of several sequences. So it runs for one sequence after
//! another, or as a batch for those of one row, and what lies before and after it, all of the weights,
//! for the rows of all. Attention that is given a spare row, as in quantized layers, has no batch: a row
//! alone has other bits than beside its spare.

use std::collections::HashSet;

use prost::Message;

use super::row_graph::{IntegerAttribute, Model, Operator, RowGraph};
use crate::bundle::onnx::{Dimension, Shape, TensorType, Type, ValueInfo};

const FLOAT: i32 = 1;
/// AttributeProto.GRAPH: such nodes may take values that they do not list.
const GRAPH: i32 = 5;
/// What attention takes beside rows and stored tensors.
const LENGTHS: [&str; 2] = ["seqlens_k", "total_sequence_length"];

/// A value, fp32 [1, rows, width], that crosses a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Crossing {
    pub(super) name: String,
    pub(super) width: usize,
}

/// A layer's graph in three, as ONNX files.
pub(super) struct CutGraph {
    pub(super) before: Vec<u8>,
    pub(super) attention: Vec<u8>,
    pub(super) after: Vec<u8>,
    /// What attention takes of rows, which is query, key and value or all in one; and last what it
    /// makes of them.
    pub(super) crossings: Vec<Crossing>,
}

/// The stored tensor's name alone.
#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(string, tag = "8")]
    name: String,
}

/// The layer graph `graph`, whose attention has heads of `head_size`, cut around it. None where it has
/// not one attention, or this takes anything else of the rows.
pub(super) fn around_attention(graph: &[u8], head_size: usize) -> Option<CutGraph> {
    let model = Model::decode(graph).ok()?;
    let graph = model.graph.as_ref()?;
    if !graph.sparse_initializer.is_empty() || graph.node.iter().any(Operator::has_graphs) {
        return None;
    }
    let mut attentions = graph.node.iter().filter(|node| node.is_attention());
    let (attention, None) = (attentions.next()?, attentions.next()) else {
        return None;
    };
    let (given, attended) = crossings(graph, attention, head_size)?;
    let (presents, outputs): (Vec<_>, Vec<_>) = graph
        .output
        .iter()
        .partition(|output| output.name.starts_with("present_"));
    let values: Vec<_> = given.iter().map(Crossing::value).collect();
    let attended_value = attended.value();
    let piece = |from: &[ValueInfo], to: Vec<&ValueInfo>| piece(graph, from, &to);
    let whole = |graph: RowGraph| {
        let model = Model {
            graph: Some(graph),
            ..model.clone()
        };
        model.encode_to_vec()
    };
    let mut results = presents;
    results.insert(0, &attended_value);
    let attention = piece(&values, results);
    let takes_rows = |input: &ValueInfo| {
        let name = &input.name;
        !name.starts_with("past_")
            && !LENGTHS.contains(&name.as_str())
            && !given.iter().any(|crossing| crossing.name == *name)
    };
    if attention.input.iter().any(takes_rows) {
        return None;
    }
    Some(CutGraph {
        before: whole(piece(&[], values.iter().collect())),
        attention: whole(attention),
        after: whole(piece(std::slice::from_ref(&attended_value), outputs)),
        crossings: given.into_iter().chain([attended]).collect(),
    })
}

/// What goes into the nodes of `attention`, those of a spare row included, and what comes out of them.
fn crossings(
    graph: &RowGraph,
    attention: &Operator,
    head_size: usize,
) -> Option<(Vec<Crossing>, Crossing)> {
    let heads = attention.integer("num_heads")?.checked_mul(head_size)?;
    let key_value = attention.integer("kv_num_heads")?.checked_mul(head_size)?;
    let rows: Vec<_> = attention.input.get(..3)?.iter().collect();
    let widths = match rows[1].is_empty() {
        true => [heads + 2 * key_value, 0, 0],
        false => [heads, key_value, key_value],
    };
    let pads = || graph.node.iter().filter(|node| node.op_type == "Pad");
    let named = rows.into_iter().zip(widths);
    let named = named.filter(|(name, _)| !name.is_empty());
    let given = named.map(|(name, width)| {
        let pad = pads().find(|node| node.output.first() == Some(name));
        Some(Crossing {
            name: pad.map_or(Some(name), |pad| pad.input.first())?.clone(),
            width,
        })
    });
    let attended = attention.output.first()?;
    let cut = pads().find(|node| node.input.first() == Some(attended));
    let attended = Crossing {
        name: cut
            .map_or(Some(attended), |cut| cut.output.first())?
            .clone(),
        width: heads,
    };
    Some((given.collect::<Option<_>>()?, attended))
}

/// What of `graph` makes `to` of its inputs and `from`.
pub(super) fn piece(graph: &RowGraph, from: &[ValueInfo], to: &[&ValueInfo]) -> RowGraph {
    let given: HashSet<_> = from.iter().map(|value| &value.name).collect();
    let mut wanted: HashSet<_> = to.iter().map(|value| &value.name).collect();
    let mut nodes = Vec::new();
    // they are in the order in which they run
    for node in graph.node.iter().rev() {
        let outputs = || node.output.iter().filter(|name| !name.is_empty());
        if outputs().any(|name| wanted.contains(name) && !given.contains(name)) {
            wanted.extend(&node.input);
            nodes.push(node.clone());
        }
    }
    nodes.reverse();
    let inputs = graph.input.iter().chain(from);
    let inputs = inputs.filter(|value| wanted.contains(&value.name));
    let initializers = graph.initializer.iter().filter(|tensor| {
        Stored::decode(&***tensor).is_ok_and(|stored| wanted.contains(&stored.name))
    });
    RowGraph {
        node: nodes,
        name: graph.name.clone(),
        initializer: initializers.cloned().collect(),
        input: inputs.cloned().collect(),
        output: to.iter().copied().cloned().collect(),
        sparse_initializer: Vec::new(),
    }
}

impl Crossing {
    pub(super) fn value(&self) -> ValueInfo {
        let size = |size: usize| Dimension {
            dim_value: Some(size as i64),
            dim_param: None,
        };
        let rows = Dimension {
            dim_value: None,
            dim_param: Some("tokens".into()),
        };
        let shape = Shape {
            dim: vec![size(1), rows, size(self.width)],
        };
        ValueInfo {
            name: self.name.clone(),
            r#type: Some(Type {
                tensor_type: Some(TensorType {
                    elem_type: FLOAT,
                    shape: Some(shape),
                }),
            }),
        }
    }
}

impl Operator {
    fn attributes(&self) -> impl Iterator<Item = IntegerAttribute> {
        let attributes = self.attribute.iter();
        attributes.filter_map(|bytes| IntegerAttribute::decode(&**bytes).ok())
    }

    fn has_graphs(&self) -> bool {
        self.attributes().any(|attribute| attribute.r#type == GRAPH)
    }

    pub(super) fn integer(&self, name: &str) -> Option<usize> {
        let mut attributes = self.attributes();
        let attribute = attributes.find(|attribute| attribute.name == name)?;
        usize::try_from(attribute.i?).ok()
    }
}

#[cfg(test)]
impl Operator {
    pub(super) fn with_integer(mut self, name: &str, number: i64) -> Self {
        let attribute = IntegerAttribute {
            name: name.into(),
            i: Some(number),
            r#type: 2,
        };
        self.attribute.push(attribute.encode_to_vec());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn float(name: &str, sizes: &[i64]) -> ValueInfo {
        let dim = sizes.iter().map(|&size| Dimension {
            dim_value: (size > 0).then_some(size),
            dim_param: None,
        });
        ValueInfo {
            name: name.into(),
            r#type: Some(Type {
                tensor_type: Some(TensorType {
                    elem_type: FLOAT,
                    shape: Some(Shape { dim: dim.collect() }),
                }),
            }),
        }
    }

    fn stored(name: &str) -> Vec<u8> {
        let stored = Stored { name: name.into() };
        stored.encode_to_vec()
    }

    fn operator(op_type: &str, inputs: &[&str], outputs: &[&str]) -> Operator {
        Operator {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: outputs.iter().map(ToString::to_string).collect(),
            op_type: op_type.into(),
            ..Operator::default()
        }
    }

    /// With 4 heads, and 2 of keys and values.
    fn attention(inputs: &[&str]) -> Operator {
        let outputs = ["attended", "present_key_0", "present_value_0"];
        operator("GroupQueryAttention", inputs, &outputs)
            .with_integer("num_heads", 4)
            .with_integer("kv_num_heads", 2)
    }

    /// A layer as quantized bundles have it, around `attention`.
    fn layer(attention: Operator) -> Vec<Operator> {
        vec![
            operator("Norm", &["x", "norm.weight"], &["normed"]),
            operator("MatMulNBits", &["normed", "qkv.weight"], &["qkv"]),
            operator("Pad", &["qkv", "pads"], &["padded"]),
            operator("Add", &["seqlens_k", "one"], &["length"]),
            operator("Add", &["total_sequence_length", "one"], &["total"]),
            attention,
            operator("Pad", &["attended", "cut"], &["rows"]),
            operator("MatMulNBits", &["rows", "o.weight"], &["product"]),
            operator("Add", &["product", "normed"], &["y"]),
            operator("Sum", &["x", "y"], &["stability"]),
        ]
    }

    fn packed(name: &str) -> Operator {
        attention(&[
            name,
            "",
            "",
            "past_key_0",
            "past_value_0",
            "length",
            "total",
            "table",
        ])
    }

    fn model(node: Vec<Operator>) -> Vec<u8> {
        let past = |name| float(name, &[1, 2, 0, 8]);
        let weights = ["norm.weight", "qkv.weight", "o.weight"];
        let constants = ["pads", "cut", "one", "table"];
        let graph = RowGraph {
            node,
            name: "layer_000".into(),
            initializer: weights.into_iter().chain(constants).map(stored).collect(),
            input: vec![
                float("x", &[1, 0, 32]),
                float("seqlens_k", &[1]),
                float("total_sequence_length", &[]),
                past("past_key_0"),
                past("past_value_0"),
            ],
            output: vec![
                float("y", &[1, 0, 32]),
                past("present_key_0"),
                past("present_value_0"),
                float("stability", &[1, 0, 1]),
            ],
            ..RowGraph::default()
        };
        let model = Model {
            ir_version: 10,
            graph: Some(graph),
            ..Model::default()
        };
        model.encode_to_vec()
    }

    fn names(values: &[ValueInfo]) -> Vec<&str> {
        values.iter().map(|value| &*value.name).collect()
    }

    /// What a piece takes, stores, computes and gives.
    fn contents(piece: &[u8]) -> [String; 4] {
        let graph = Model::decode(piece).unwrap().graph.unwrap();
        let stored = graph.initializer.iter();
        let stored = stored.map(|tensor| Stored::decode(&**tensor).unwrap().name);
        let operators = graph.node.iter().map(|node| &*node.op_type);
        [
            names(&graph.input).join(" "),
            stored.collect::<Vec<_>>().join(" "),
            operators.collect::<Vec<_>>().join(" "),
            names(&graph.output).join(" "),
        ]
    }

    #[test]
    fn each_piece_has_what_it_needs() {
        let cut = around_attention(&model(layer(packed("padded"))), 8).unwrap();
        let before = ["x", "norm.weight qkv.weight", "Norm MatMulNBits", "qkv"];
        assert_eq!(contents(&cut.before), before);
        assert_eq!(
            contents(&cut.attention),
            [
                "seqlens_k total_sequence_length past_key_0 past_value_0 qkv",
                "pads cut one table",
                "Pad Add Add GroupQueryAttention Pad",
                "rows present_key_0 present_value_0",
            ]
        );
        assert_eq!(
            contents(&cut.after),
            [
                "x rows",
                "norm.weight o.weight",
                // what both sides of attention read is computed twice
                "Norm MatMulNBits Add Sum",
                "y stability",
            ]
        );
    }

    #[test]
    fn attention_without_a_spare_row_is_cut_out_alone() {
        let mut nodes = layer(packed("qkv"));
        nodes.retain(|node| node.op_type != "Pad");
        nodes[4].output[0] = "rows".into();
        let cut = around_attention(&model(nodes), 8).unwrap();
        let [_, _, operators, results] = contents(&cut.attention);
        assert_eq!(operators, "Add Add GroupQueryAttention");
        assert_eq!(results, "rows present_key_0 present_value_0");
    }

    #[test]
    fn crossings_are_as_wide_as_heads() {
        let crossing = |(name, width): (&str, usize)| Crossing {
            name: name.into(),
            width,
        };
        let packed = around_attention(&model(layer(packed("padded"))), 8).unwrap();
        let expected = [("qkv", 64), ("rows", 32)].map(crossing);
        assert_eq!(packed.crossings, expected);
        let parts = ["query", "key", "value", "past_key_0", "past_value_0"];
        let mut nodes = layer(attention(&[&parts[..], &["length", "total"]].concat()));
        for name in ["value", "key", "query"] {
            nodes.insert(
                2,
                operator("Pad", &[&format!("{name}_row"), "pads"], &[name]),
            );
            let split = operator("MatMulNBits", &["normed"], &[&format!("{name}_row")]);
            nodes.insert(2, split);
        }
        let separate = around_attention(&model(nodes), 8).unwrap();
        let expected = [
            ("query_row", 32),
            ("key_row", 16),
            ("value_row", 16),
            ("rows", 32),
        ];
        assert_eq!(separate.crossings, expected.map(crossing));
    }

    #[test]
    fn what_cannot_be_cut_stays_whole() {
        let whole = |nodes| assert!(around_attention(&model(nodes), 8).is_none());
        // several layers in one engine
        whole([layer(packed("padded")), layer(packed("padded"))].concat());
        // attention that reads the rows elsewhere, too
        let mut bias = packed("padded");
        bias.input.push("x".into());
        whole(layer(bias));
        // nodes with graphs in them
        let mut choice = operator("If", &["x"], &["chosen"]);
        let graph = IntegerAttribute {
            name: "then_branch".into(),
            i: None,
            r#type: GRAPH,
        };
        choice.attribute.push(graph.encode_to_vec());
        let mut nodes = layer(packed("padded"));
        nodes.push(choice);
        whole(nodes);
    }
}
