//! Graphs whose products with weights of 16 bits are the chain's own.

use super::kernel::Instructions;
use super::{HalfMatMul, IS_BFLOAT, IS_TRANSPOSED};
use crate::backend::onnxruntime::edited_graph::{MICROSOFT, Model, ONNX, Operator};
use crate::backend::onnxruntime::stored_values::{BFLOAT16, FLOAT16, Matrix, StoredValues};

/// Compute products with weights that are stored in 16 bits by the chain's own operator in `model`, where the
/// CPU has what it takes. False where there is none that it knows.
pub(in super::super) fn replace_half_products(model: &mut Model) -> bool {
    let graph = model.graph.as_mut();
    let Some(graph) =
        graph.filter(|graph| Instructions::of_cpu().is_some() && !graph.has_subgraphs())
    else {
        return false;
    };
    let stored = StoredValues::of(graph);
    let mut unread = Vec::new();
    for node in &mut graph.node {
        if let Some(matrix) = matrix(node, &stored) {
            unread.push(node.input[1].clone());
            replace(node, matrix);
        }
    }
    if unread.is_empty() {
        return false;
    }
    graph.remove_unread(unread);
    true
}

/// The weights of `node`, if it is a product that is known.
fn matrix(node: &Operator, stored: &StoredValues) -> Option<Matrix> {
    let is_plain = node.attribute.is_empty();
    let may_transpose = || {
        let is_transposed = node.integer("transB");
        is_plain || node.has_attributes(&["transB"]) && matches!(is_transposed, Some(0 | 1))
    };
    let is_known = if node.is(ONNX, "MatMul") {
        is_plain && node.input.len() == 2
    } else if node.is(MICROSOFT, "FusedMatMul") {
        may_transpose() && node.input.len() == 2
    } else {
        node.is(ONNX, "Gemm") && may_transpose()
    };
    if !is_known || node.output.len() != 1 {
        return None;
    }
    let mut matrix = stored.matrix(node.input.get(1)?)?;
    matrix.is_transposed ^= node.integer("transB") == Some(1);
    let columns = matrix.columns()?;
    let bias = node.input.get(2).filter(|name| !name.is_empty());
    let fits = bias.is_none_or(|bias| stored.size(bias) == Some(columns));
    let is_half = [FLOAT16, BFLOAT16].contains(&matrix.data_type);
    (fits && is_half).then_some(matrix)
}

/// Make `node` the operator.
fn replace(node: &mut Operator, matrix: Matrix) {
    let bias = node.input.get(2).cloned().unwrap_or_default();
    node.input.truncate(1);
    node.input.push(bias);
    node.input.extend(matrix.parts);
    node.attribute.clear();
    node.set_integer(IS_TRANSPOSED, usize::from(matrix.is_transposed));
    node.set_integer(IS_BFLOAT, usize::from(matrix.data_type == BFLOAT16));
    node.make::<HalfMatMul>();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::onnxruntime::edited_graph::EditedGraph;
    use crate::backend::onnxruntime::edited_graph::examples::{
        lines, operator, stored, with_subgraph,
    };
    use crate::backend::onnxruntime::stored_values::FLOAT;
    use crate::bundle::onnx::ValueInfo;

    fn with(node: Operator, attributes: &[(&std::ffi::CStr, usize)]) -> Operator {
        let mut node = node;
        for &(name, number) in attributes {
            node.set_integer(name, number);
        }
        node
    }

    fn of_domain(domain: &str, mut node: Operator) -> Operator {
        node.domain = domain.into();
        node
    }

    fn transpose(name: &str, perm: &[u8]) -> Operator {
        let mut node = operator("Transpose", name, "t");
        // an AttributeProto: its name, and integers
        let integers = [&b"\x0a\x04perm\x42"[..], &[perm.len() as u8], perm].concat();
        node.attribute.push(integers);
        node
    }

    fn cast(name: &str) -> Operator {
        let node = operator("Cast", name, &format!("{name}32"));
        with(node, &[(c"to", FLOAT as usize)])
    }

    fn product(op_type: &str, inputs: &str) -> Operator {
        with(operator(op_type, inputs, "y"), &[(c"transB", 1)])
    }

    fn replaced(node: Vec<Operator>) -> Option<Model> {
        let initializer = vec![
            stored("q", FLOAT16, &[6, 4]),
            stored("k", FLOAT16, &[2, 4]),
            stored("wide", FLOAT16, &[2, 5]),
            stored("bf", BFLOAT16, &[6, 4]),
            stored("w", FLOAT, &[6, 4]),
            stored("bias", FLOAT16, &[6]),
            stored("row", FLOAT16, &[1, 6]),
            stored("given16", FLOAT16, &[6, 4]),
        ];
        let given = ValueInfo {
            name: "given16".into(),
            ..ValueInfo::default()
        };
        let graph = EditedGraph {
            node,
            initializer,
            input: vec![given],
            ..EditedGraph::default()
        };
        let mut model = Model {
            graph: Some(graph),
            ..Model::default()
        };
        replace_half_products(&mut model).then_some(model)
    }

    #[test]
    fn products_take_weights_as_they_are_stored() {
        let joined = with(operator("Concat", "q32 k32", "qk"), &[(c"axis", 0)]);
        for (nodes, expected, is_transposed) in [
            (
                vec![cast("q"), cast("k"), joined, product("FusedMatMul", "x qk")],
                "HalfMatMul x  q k: y",
                1,
            ),
            (
                vec![cast("q"), cast("bias"), product("Gemm", "x q32 bias32")],
                "HalfMatMul x bias32 q: y",
                1,
            ),
            (
                vec![
                    cast("q"),
                    operator("Transpose", "q32", "t"),
                    operator("MatMul", "x t", "y"),
                ],
                "HalfMatMul x  q: y",
                1,
            ),
            (
                vec![cast("q"), operator("MatMul", "x q32", "y")],
                "HalfMatMul x  q: y",
                0,
            ),
        ] {
            let model = replaced(nodes).unwrap();
            let lines = lines(&model);
            assert_eq!(lines.last().unwrap(), expected);
            // but the bias, nothing is cast any more
            assert!(
                lines[..lines.len() - 1]
                    .iter()
                    .all(|line| line == "Cast bias: bias32")
            );
            let node = model.graph.unwrap().node.pop().unwrap();
            assert_eq!(node.integer("is_transposed"), Some(is_transposed));
            assert_eq!(node.integer("is_bfloat"), Some(0));
        }
        let model = replaced(vec![cast("bf"), product("Gemm", "x bf32")]).unwrap();
        assert_eq!(model.graph.unwrap().node[0].integer("is_bfloat"), Some(1));
    }

    #[test]
    fn only_transposition_is_one() {
        let nodes = |transpose: Operator| {
            let product = operator("MatMul", "x t", "y");
            vec![cast("q"), transpose, product]
        };
        assert!(replaced(nodes(transpose("q32", &[1, 0]))).is_some());
        assert!(replaced(nodes(transpose("q32", &[0, 1]))).is_none());
    }

    #[test]
    fn what_others_read_stays() {
        let nodes = vec![
            cast("q"),
            operator("Exp", "q32", "z"),
            product("Gemm", "x q32"),
        ];
        assert_eq!(
            lines(&replaced(nodes).unwrap()),
            ["Cast q: q32", "Exp q32: z", "HalfMatMul x  q: y"]
        );
    }

    #[test]
    fn other_products_stay() {
        let joined = |parts: &str| with(operator("Concat", parts, "qk"), &[(c"axis", 0)]);
        for nodes in [
            vec![product("Gemm", "x w")],
            vec![product("Gemm", "x q")],
            vec![cast("q"), product("Gemm", "x q32 bias")],
            vec![cast("q"), product("Gemm", "q32 x")],
            vec![
                cast("q"),
                with(operator("Gemm", "x q32", "y"), &[(c"transB", 2)]),
            ],
            vec![cast("q"), of_domain("mine", product("Gemm", "x q32"))],
            vec![of_domain("mine", cast("q")), product("Gemm", "x q32")],
            vec![cast("q"), product("Gemm", "x q32"), with_subgraph()],
            vec![cast("given16"), product("Gemm", "x given1632")],
            vec![cast("q"), with(product("Gemm", "x q32"), &[(c"transA", 1)])],
            vec![cast("q"), cast("row"), product("Gemm", "x q32 row32")],
            vec![cast("q"), product("Gemm", "x q32 given")],
            vec![
                cast("q"),
                cast("k"),
                joined("q32 k32"),
                operator("MatMul", "x qk", "y"),
            ],
            vec![
                cast("q"),
                cast("bf"),
                joined("q32 bf32"),
                product("Gemm", "x qk"),
            ],
            vec![
                cast("q"),
                cast("wide"),
                joined("q32 wide32"),
                product("Gemm", "x qk"),
            ],
            vec![operator("Cast", "q", "q32"), product("Gemm", "x q32")],
            vec![cast("q"), product("Conv", "x q32")],
            vec![cast("bias"), product("Gemm", "x bias32")],
        ] {
            assert!(replaced(nodes.clone()).is_none(), "{nodes:?}");
        }
    }
}
