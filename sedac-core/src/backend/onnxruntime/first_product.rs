//! A product with quantized weights, taken out of a layer's graph.

use prost::Message;

use super::edited_graph::{EditedGraph, Model, RowsValue, piece};

/// A product with quantized weights, as a graph of its own.
pub(super) struct Product {
    pub(super) graph: Vec<u8>,
    /// What it takes, and what it gives.
    pub(super) values: [RowsValue; 2],
}

/// The first product with quantized weights in `graph`.
pub(super) fn first_product(graph: &[u8]) -> Option<Product> {
    let model = Model::of_file(graph)?;
    let whole = model.graph.as_ref()?;
    let product = whole
        .node
        .iter()
        .find(|node| node.op_type == "MatMulNBits")?;
    let value = |name: &String, size| {
        let width = product.integer(size)?;
        let name = name.clone();
        Some(RowsValue { name, width })
    };
    let values = [
        value(product.input.first()?, "K")?,
        value(product.output.first()?, "N")?,
    ];
    let [taken, given] = values.each_ref().map(RowsValue::value);
    let graph: EditedGraph = piece(whole, &[taken], &[&given]);
    let model = Model {
        graph: Some(graph),
        ..model
    };
    Some(Product {
        graph: model.encode_to_vec(),
        values,
    })
}

#[cfg(test)]
mod tests {
    use super::super::edited_graph::Operator;
    use super::super::edited_graph::examples::{lines, operator};
    use super::*;

    fn model(node: Vec<Operator>) -> Vec<u8> {
        let graph = EditedGraph {
            node,
            ..EditedGraph::default()
        };
        let model = Model {
            graph: Some(graph),
            ..Model::default()
        };
        model.encode_to_vec()
    }

    #[test]
    fn the_first_product_is_alone_with_its_weights() {
        assert!(first_product(&model(vec![operator("MatMul", "x w", "y")])).is_none());
        let mut product = operator("MatMulNBits", "normed weight scales", "y");
        for (name, number) in [("K", 8), ("N", 4)] {
            product.set_integer(name, number);
        }
        let product = first_product(&model(vec![
            operator("Norm", "x", "normed"),
            operator("Concat", "query key", "weight"),
            product,
            operator("Sigmoid", "y", "z"),
        ]));
        let product = product.unwrap();
        assert_eq!(
            lines(&Model::decode(&*product.graph).unwrap()),
            [
                "Concat query key: weight",
                "MatMulNBits normed weight scales: y"
            ]
        );
        let widths = product
            .values
            .map(|crossing| (crossing.name, crossing.width));
        assert_eq!(widths, [("normed".into(), 8), ("y".into(), 4)]);
    }
}
