//! Exit rules' tables in a device's memory.

use super::chain_device::{ChainDevice, MAX_TABLES};
use crate::error::Result;
use crate::policy::Condition;

/// The tables that a device has, the most recently used last. Drafts and the tokens between them
/// alternate between rules, which are written once.
#[derive(Debug, Default)]
pub(super) struct RuleTables(Vec<RuleTable>);

#[derive(Debug)]
struct RuleTable {
    index: usize,
    address: u64,
    conditions: Vec<Condition>,
}

impl RuleTables {
    /// The address of `conditions`, which replace the least recently used table where the device
    /// does not have them. A pass or batch uses fewer tables than there are, so that its own stay.
    ///
    /// # Errors
    /// What the device reports.
    pub(super) fn find_or_write(
        &mut self,
        device: &mut impl ChainDevice,
        conditions: Vec<Condition>,
    ) -> Result<u64> {
        let Self(tables) = self;
        let known = tables
            .iter()
            .position(|table| table.conditions == conditions);
        let table = match known {
            Some(known) => tables.remove(known),
            None => {
                let index = if tables.len() < MAX_TABLES {
                    tables.len()
                } else {
                    tables.remove(0).index
                };
                let written = device.write_conditions(index, &conditions);
                RuleTable {
                    index,
                    address: written.inspect_err(|_| tables.clear())?,
                    conditions,
                }
            }
        };
        let address = table.address;
        tables.push(table);
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::abi::PassOutcome;
    use super::super::chain_device::PassPlan;
    use super::*;
    use crate::error::Error;

    /// Remembers what is written, and fails when told to.
    #[derive(Default)]
    struct Tables {
        written: Vec<usize>,
        fails: bool,
    }

    impl ChainDevice for Tables {
        fn vocabulary(&self) -> usize {
            unreachable!("nothing runs")
        }

        fn probes(&self) -> &[usize] {
            unreachable!("nothing runs")
        }

        fn exit_heads(&self) -> &[usize] {
            unreachable!("nothing runs")
        }

        fn write_conditions(&mut self, table: usize, _: &[Condition]) -> Result<u64> {
            if self.fails {
                return Err(Error::Cancelled);
            }
            self.written.push(table);
            Ok(100 + table as u64)
        }

        fn run(&mut self, _: &PassPlan) -> Result<PassOutcome> {
            unreachable!("nothing runs")
        }

        fn logits(&mut self, _: Range<usize>) -> Result<Vec<f32>> {
            unreachable!("nothing runs")
        }

        fn reserve(&mut self, _: usize) -> Result<()> {
            unreachable!("nothing runs")
        }

        fn copy(&mut self, _: usize, _: usize, _: usize) -> Result<()> {
            unreachable!("nothing runs")
        }

        fn clear(&mut self, _: usize) -> Result<()> {
            unreachable!("nothing runs")
        }
    }

    fn rule(number: usize) -> Vec<Condition> {
        let condition = Condition {
            threshold: number as f32,
            ..Condition::default()
        };
        vec![condition]
    }

    #[test]
    fn the_least_recently_used_table_is_replaced() {
        let (mut tables, mut device) = (RuleTables::default(), Tables::default());
        let mut find = |number, device: &mut Tables| tables.find_or_write(device, rule(number));
        for number in (0..MAX_TABLES).chain(0..2) {
            assert_eq!(find(number, &mut device).unwrap(), 100 + number as u64);
        }
        assert_eq!(device.written, Vec::from_iter(0..MAX_TABLES));
        assert_eq!(find(MAX_TABLES, &mut device).unwrap(), 102);
        assert_eq!(find(0, &mut device).unwrap(), 100);
        assert_eq!(find(2, &mut device).unwrap(), 103);
    }

    #[test]
    fn nothing_is_believed_after_a_failure() {
        let (mut tables, mut device) = (RuleTables::default(), Tables::default());
        tables.find_or_write(&mut device, rule(1)).unwrap();
        device.fails = true;
        assert!(tables.find_or_write(&mut device, rule(2)).is_err());
        assert!(tables.find_or_write(&mut device, rule(1)).is_err());
    }
}
