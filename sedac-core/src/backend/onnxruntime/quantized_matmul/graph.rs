//! Graphs whose products with quantized weights are the chain's own.

use super::kernel::Instructions;
use super::weights::Format;
use super::{HAS_ZERO_POINTS, QuantizedMatMul};
use crate::backend::onnxruntime::edited_graph::{MICROSOFT, Model, Operator};
use crate::backend::onnxruntime::stored_values::{FLOAT, StoredValues, UINT8};

/// The `accuracy_level` of products whose rows are rounded to 8 bits.
const ROUNDED: usize = 4;

/// Compute products with quantized weights by the chain's own operator in `model`, where the CPU has what it
/// takes. False where there is none that it knows.
pub(in super::super) fn replace_quantized_products(model: &mut Model) -> bool {
    let Some(graph) = model
        .graph
        .as_mut()
        .filter(|graph| Instructions::of_cpu().is_some() && !graph.has_subgraphs())
    else {
        return false;
    };
    let stored = StoredValues::of(graph);
    let mut unread = Vec::new();
    for node in &mut graph.node {
        if let Some(parts) = parts(node, &stored) {
            unread.extend(node.input[1..].iter().cloned());
            replace(node, &parts);
        }
    }
    if unread.is_empty() {
        return false;
    }
    graph.remove_unread(unread);
    true
}

/// The weights, scales and zero points of `node`, each by part, if it is a product that is known.
fn parts(node: &Operator, stored: &StoredValues) -> Option<Vec<Vec<String>>> {
    let is_rounded = node.integer("accuracy_level") == Some(ROUNDED);
    if !node.is(MICROSOFT, "MatMulNBits") || !is_rounded || node.output.len() != 1 {
        return None;
    }
    let given = |index: usize| node.input.get(index).filter(|name| !name.is_empty());
    let format = Format {
        bits: node.integer("bits")?,
        block_size: node.integer("block_size")?,
        rows: node.integer("K")?,
        has_zero_points: given(3).is_some(),
    };
    if !format.is_known() || given(4).is_some() || node.input.len() > 6 {
        return None;
    }
    let mut parts = vec![
        stored.parts(given(1)?, UINT8)?,
        stored.parts(given(2)?, FLOAT)?,
    ];
    if let Some(zero_points) = given(3) {
        parts.push(stored.parts(zero_points, UINT8)?);
    }
    let count = parts[0].len();
    parts.iter().all(|of| of.len() == count).then_some(parts)
}

/// Make `node` the operator, with `parts`, each of them by part of the columns.
fn replace(node: &mut Operator, parts: &[Vec<String>]) {
    let bias = node.input.get(5).cloned().unwrap_or_default();
    let mut input = vec![node.input[0].clone(), bias];
    for part in 0..parts[0].len() {
        input.extend(parts.iter().map(|of| of[part].clone()));
    }
    node.input = input;
    let has_zero_points = usize::from(parts.len() == 3);
    node.set_integer(HAS_ZERO_POINTS, has_zero_points);
    node.make::<QuantizedMatMul>();
}

#[cfg(test)]
mod tests {
    use super::super::super::edited_graph::examples::{lines, operator, stored};
    use super::*;
    use crate::backend::onnxruntime::edited_graph::EditedGraph;

    fn product(inputs: &str) -> Operator {
        let mut node = operator("MatMulNBits", inputs, "y");
        for (name, number) in [
            (c"K", 64),
            (c"N", 8),
            (c"bits", 4),
            (c"block_size", 32),
            (c"accuracy_level", 4),
        ] {
            node.set_integer(name, number);
        }
        node
    }

    fn joined(parts: &str, output: &str) -> Operator {
        let mut node = operator("Concat", parts, output);
        node.set_integer(c"axis", 0);
        node
    }

    fn model(node: Vec<Operator>) -> Model {
        let numbers = ["q", "k", "q.zeros", "k.zeros"].map(|name| stored(name, UINT8, &[8]));
        let floats =
            ["q.scales", "k.scales", "bias", "zeros"].map(|name| stored(name, FLOAT, &[8]));
        let graph = EditedGraph {
            node,
            initializer: numbers.into_iter().chain(floats).collect(),
            ..EditedGraph::default()
        };
        Model {
            graph: Some(graph),
            ..Model::default()
        }
    }

    fn replaced(node: Vec<Operator>) -> Option<Vec<String>> {
        let mut model = model(node);
        replace_quantized_products(&mut model).then(|| lines(&model))
    }

    #[test]
    fn products_take_stored_weights_and_a_bias() {
        assert_eq!(
            replaced(vec![product("x q q.scales")]).unwrap(),
            ["QuantizedMatMul x  q q.scales: y"]
        );
        assert_eq!(
            replaced(vec![product("x q q.scales q.zeros - bias")]).unwrap(),
            ["QuantizedMatMul x bias q q.scales q.zeros: y"]
        );
        let mut model = model(vec![product("x q q.scales q.zeros")]);
        replace_quantized_products(&mut model);
        let node = &model.graph.unwrap().node[0];
        assert_eq!(node.integer("has_zero_points"), Some(1));
        assert_eq!(node.domain, "sedac");
    }

    #[test]
    fn joined_weights_are_taken_apart() {
        let nodes = vec![
            joined("q k", "qk"),
            joined("q.scales k.scales", "qk.scales"),
            product("x qk qk.scales"),
        ];
        assert_eq!(
            replaced(nodes.clone()).unwrap(),
            ["QuantizedMatMul x  q q.scales k k.scales: y"]
        );
        let shared = [&nodes[..], &[operator("Cast", "qk.scales", "z")]].concat();
        assert_eq!(
            replaced(shared).unwrap(),
            [
                "Concat q.scales k.scales: qk.scales",
                "QuantizedMatMul x  q q.scales k k.scales: y",
                "Cast qk.scales: z",
            ]
        );
    }

    #[test]
    fn other_products_stay() {
        let mut exact = product("x q q.scales");
        exact.attribute.pop();
        let mut wide = product("x q q.scales");
        wide.attribute.clear();
        let other_axis = vec![operator("Concat", "q k", "qk"), product("x qk q.scales")];
        for nodes in [
            vec![operator("MatMul", "x q", "y")],
            vec![exact],
            vec![wide],
            vec![product("x given q.scales")],
            vec![product("x q bias_of_another_type")],
            vec![product("x q q.scales zeros")],
            vec![product("x q q.scales - order")],
            vec![product("x q q.scales - - bias more")],
            vec![product("x q")],
            vec![joined("q k", "qk"), product("x qk q.scales")],
            other_axis,
        ] {
            assert_eq!(replaced(nodes.clone()), None, "{nodes:?}");
        }
    }
}
