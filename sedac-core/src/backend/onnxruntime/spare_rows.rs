//! Quantized graphs, whose attention is given a spare row, without it.
//!
//! With the spare row, rows have the same bits in passes of any length, if the products with quantized
//! weights give them the same. Where the CPU's do not, it takes time for nothing.

use std::collections::{HashMap, HashSet};

use prost::Message;

use super::cut_graph::{Crossing, piece};
use super::row_graph::{Model, Operator, RowGraph};

/// What attention is given of rows and positions, padded.
const ROWS: [usize; 4] = [0, 1, 2, 9];
/// And of lengths, one more than there are.
const LENGTHS: [usize; 2] = [5, 6];

/// A product with quantized weights, as a graph of its own.
pub(super) struct Product {
    pub(super) graph: Vec<u8>,
    /// What it takes, and what it gives.
    pub(super) crossings: [Crossing; 2],
}

/// The graph `graph` without spare rows. None where its attention has none.
pub(super) fn without(graph: &[u8]) -> Option<Vec<u8>> {
    let mut model = Model::decode(graph).ok()?;
    let nodes = &mut model.graph.as_mut()?.node;
    let attentions = || nodes.iter().filter(|node| node.is_attention());
    let given = |inputs: &[usize]| -> HashSet<_> {
        let of = |node: &Operator| {
            inputs
                .iter()
                .filter_map(|&n| node.input.get(n))
                .cloned()
                .collect::<Vec<_>>()
        };
        attentions().flat_map(of).collect()
    };
    let (rows, lengths) = (given(&ROWS), given(&LENGTHS));
    let attended: HashSet<_> = attentions().map(|node| node.output[0].clone()).collect();
    let (extensions, mut others): (Vec<_>, Vec<_>) =
        std::mem::take(nodes).into_iter().partition(|node| {
            let given = |names: &HashSet<String>| names.contains(&node.output[0]);
            match &*node.op_type {
                "Pad" => given(&rows) || attended.contains(&node.input[0]),
                "Add" => given(&lengths),
                _ => false,
            }
        });
    if extensions.is_empty() {
        return None;
    }
    let names: HashMap<_, _> = extensions.iter().map(renamed(&attended)).collect();
    for node in &mut others {
        let values = node.input.iter_mut().chain(&mut node.output);
        for value in values {
            if let Some(&name) = names.get(value) {
                name.clone_into(value);
            }
        }
    }
    *nodes = others;
    Some(model.encode_to_vec())
}

/// What a value has to be called instead without the node that extends it, or cuts it.
fn renamed<'a>(attended: &HashSet<String>) -> impl Fn(&'a Operator) -> (&'a String, &'a String) {
    |node| {
        let (before, after) = (&node.input[0], &node.output[0]);
        match attended.contains(before) {
            true => (before, after),
            false => (after, before),
        }
    }
}

/// The first product with quantized weights in `graph`.
pub(super) fn first_product(graph: &[u8]) -> Option<Product> {
    let model = Model::decode(graph).ok()?;
    let whole = model.graph.as_ref()?;
    let product = whole
        .node
        .iter()
        .find(|node| node.op_type == "MatMulNBits")?;
    let crossing = |name: &String, size| {
        let width = product.integer(size)?;
        let name = name.clone();
        Some(Crossing { name, width })
    };
    let crossings = [
        crossing(product.input.first()?, "K")?,
        crossing(product.output.first()?, "N")?,
    ];
    let [taken, given] = crossings.each_ref().map(Crossing::value);
    let graph: RowGraph = piece(whole, &[taken], &[&given]);
    let model = Model {
        graph: Some(graph),
        ..model
    };
    Some(Product {
        graph: model.encode_to_vec(),
        crossings,
    })
}

#[cfg(test)]
mod tests {
    use super::super::row_graph::examples::{lines, operator};
    use super::*;

    fn model(node: Vec<Operator>) -> Vec<u8> {
        let graph = RowGraph {
            node,
            ..RowGraph::default()
        };
        let model = Model {
            graph: Some(graph),
            ..Model::default()
        };
        model.encode_to_vec()
    }

    #[test]
    fn attention_takes_and_gives_the_rows_themselves() {
        let attention = "padded - - past_key_0 past_value_0 length total cos sin places";
        let graph = model(vec![
            operator("Pad", "qkv pads", "padded"),
            operator("Pad", "position_ids pads", "places"),
            operator("Add", "seqlens_k one", "length"),
            operator("Add", "total_sequence_length one", "total"),
            operator("GroupQueryAttention", attention, "spare present_key_0"),
            operator("Pad", "spare cut", "rows"),
            operator("Add", "x rows", "y"),
        ]);
        assert_eq!(
            lines(&without(&graph).unwrap()),
            [
                "GroupQueryAttention qkv   past_key_0 past_value_0 seqlens_k total_sequence_length \
                 cos sin position_ids: rows present_key_0",
                "Add x rows: y",
            ]
        );
    }

    #[test]
    fn other_graphs_stay_as_they_are() {
        let attention = operator(
            "GroupQueryAttention",
            "qkv - - key value lengths",
            "rows keys",
        );
        let padding = operator("Pad", "x pads", "wider");
        let bias = operator("Add", "product bias", "qkv");
        assert_eq!(without(&model(vec![padding, bias, attention])), None);
    }

    #[test]
    fn the_first_product_is_alone_with_its_weights() {
        assert!(first_product(&model(vec![operator("MatMul", "x w", "y")])).is_none());
        let mut product = operator("MatMulNBits", "normed weight scales", "y");
        for (name, number) in [("K", 8), ("N", 4)] {
            product = product.with_integer(name, number);
        }
        let product = first_product(&model(vec![
            operator("Norm", "x", "normed"),
            operator("Concat", "query key", "weight"),
            product,
            operator("Sigmoid", "y", "z"),
        ]));
        let product = product.unwrap();
        assert_eq!(
            lines(&product.graph),
            [
                "Concat query key: weight",
                "MatMulNBits normed weight scales: y"
            ]
        );
        let widths = product
            .crossings
            .map(|crossing| (crossing.name, crossing.width));
        assert_eq!(widths, [("normed".into(), 8), ("y".into(), 4)]);
    }
}
