//! Graphs of single layers without their stability.
//!
//! Most passes run under no rule, and where one decides, the host has the residual streams before and
//! after the layer. On SmolLM2 in int4 on two cores, the operators of stability are 5 % of a step.

use prost::Message;

use super::edited_graph::{EditedGraph, Model, Operator};
use crate::bundle::onnx::ValueInfo;

const STABILITY: &str = "stability";
/// Gives a sum, last, and first its norm.
const SUM_AND_NORM: &str = "SkipSimplifiedLayerNormalization";

/// The graph `graph` of a layer without the output of stability. None where it cannot be read.
pub(super) fn without(graph: &[u8]) -> Option<Vec<u8>> {
    let mut model = Model::of_file(graph)?;
    let whole = model.graph.as_ref()?;
    let outputs = whole.output.iter();
    let outputs: Vec<&ValueInfo> = outputs.filter(|output| output.name != STABILITY).collect();
    let mut rest = whole.piece(&outputs);
    drop_unread_norms(&mut rest);
    model.graph = Some(rest);
    Some(model.encode_to_vec())
}

/// Only add where nothing reads the norm of a sum.
fn drop_unread_norms(graph: &mut EditedGraph) {
    let inputs = graph
        .node
        .iter()
        .flat_map(|node| node.input.iter().cloned());
    let outputs = graph.output.iter().map(|output| output.name.clone());
    let read: Vec<_> = inputs.chain(outputs).collect();
    for node in &mut graph.node {
        let only_sums = |node: &Operator| {
            let [norm, _, _, _] = &node.output[..] else {
                return false;
            };
            // what comes after the weight is added, too
            node.op_type == SUM_AND_NORM && node.input.len() == 3 && !read.contains(norm)
        };
        if only_sums(node) {
            *node = Operator {
                input: node.input[..2].to_vec(),
                output: node.output[3..].to_vec(),
                name: node.name.clone(),
                op_type: "Add".into(),
                ..Operator::default()
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::edited_graph::examples::{lines, operator};
    use super::*;

    fn kept(node: Vec<Operator>, outputs: &[&str]) -> Vec<String> {
        let value = |name: &&str| ValueInfo {
            name: (*name).into(),
            ..ValueInfo::default()
        };
        let model = Model {
            graph: Some(EditedGraph {
                node,
                output: outputs.iter().map(value).collect(),
                ..EditedGraph::default()
            }),
            ..Model::default()
        };
        let graph = without(&model.encode_to_vec()).unwrap();
        let model = Model::decode(&*graph).unwrap();
        let lines = lines(&model);
        let outputs = model.graph.unwrap().output.into_iter();
        lines
            .into_iter()
            .chain(outputs.map(|output| output.name))
            .collect()
    }

    #[test]
    fn what_stability_alone_takes_is_gone() {
        let nodes = vec![
            operator(SUM_AND_NORM, "x attended weight", "normed - - sum"),
            operator("MatMul", "normed w", "product"),
            operator(SUM_AND_NORM, "sum product halves", "along_y - - y"),
            operator("Norm", "x halves", "along_x"),
            operator("Add", "along_x along_y", "total"),
            operator("ReduceSumSquare", "total axes", STABILITY),
        ];
        assert_eq!(
            kept(nodes, &["y", STABILITY]),
            [
                "SkipSimplifiedLayerNormalization x attended weight: normed   sum",
                "MatMul normed w: product",
                "Add sum product: y",
                "y",
            ]
        );
    }

    #[test]
    fn what_others_read_stays() {
        let nodes = vec![
            operator(SUM_AND_NORM, "x product halves bias", "along_y - - y"),
            operator("Norm", "x halves", "along_x"),
            operator("Add", "along_x y", STABILITY),
            operator("Probe", "along_x stability", "risk"),
        ];
        let expected = [
            "SkipSimplifiedLayerNormalization x product halves bias: along_y   y",
            "Norm x halves: along_x",
            "Add along_x y: stability",
            "Probe along_x stability: risk",
            "y",
            "risk",
        ];
        assert_eq!(kept(nodes, &["y", STABILITY, "risk"]), expected);
    }
}
