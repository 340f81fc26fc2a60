-- SPDX-License-Identifier: Apache-2.0
-- Triggers of a store in SQLite: against slips, not against whoever holds the file.

CREATE TRIGGER IF NOT EXISTS "${trigger}_update" BEFORE UPDATE ON $log
WHEN $sealed_changed
     OR $filled_in
     OR CASE WHEN $emptied
       THEN NEW.salt NOT LIKE '{"keys":{%},"leaves":{"%}}'
       ELSE NEW.salt IS NOT OLD.salt END
BEGIN
  SELECT RAISE(ABORT, 'fasten: rows are changed by fasten erase only');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_delete" BEFORE DELETE ON $log
WHEN NOT EXISTS (
  SELECT 1 FROM $head WHERE service_id = OLD.service_id
    AND source_node_id = OLD.source_node_id
    AND retention_class = OLD.retention_class AND pruned_seq >= OLD.monotonic_seq)
BEGIN
  SELECT RAISE(ABORT, 'fasten: rows are deleted by fasten sweep only');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_head_update" BEFORE UPDATE ON $head
WHEN NEW.service_id IS NOT OLD.service_id
  OR NEW.source_node_id IS NOT OLD.source_node_id
  OR NEW.retention_class IS NOT OLD.retention_class
  OR NEW.seq < OLD.seq OR NEW.count < OLD.count
  OR NEW.pruned_seq < OLD.pruned_seq OR NEW.pruned_seq > NEW.seq
  OR NEW.pruned_count < OLD.pruned_count OR NEW.pruned_count > NEW.count
BEGIN
  SELECT RAISE(ABORT, 'fasten: a head moves forward only');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_head_delete" BEFORE DELETE ON $head
BEGIN
  SELECT RAISE(ABORT, 'fasten: a head stays, also of an empty chain');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_node_update" BEFORE UPDATE ON $node
WHEN NEW.service_id IS NOT OLD.service_id
  OR NEW.source_node_id IS NOT OLD.source_node_id OR NEW.seq < OLD.seq
BEGIN
  SELECT RAISE(ABORT, 'fasten: a node counts forward only');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_node_delete" BEFORE DELETE ON $node
BEGIN
  SELECT RAISE(ABORT, 'fasten: a node stays');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_checkpoint_update" BEFORE UPDATE ON $checkpoint
BEGIN
  SELECT RAISE(ABORT, 'fasten: a checkpoint never changes');
END;
-- ;
CREATE TRIGGER IF NOT EXISTS "${trigger}_checkpoint_delete" BEFORE DELETE ON $checkpoint
WHEN OLD.created_at >= strftime('%Y-%m-%dT%H:%M:%f', 'now', '-30 days') || '000Z'
BEGIN
  SELECT RAISE(ABORT, 'fasten: checkpoints of the last 30 days stay');
END;
