package node

import (
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// What is not known to have been agreed is proposed again only where that cannot turn
// "done" into "refused", or undo another's change.
func TestRepeatable(t *testing.T) {
	entries := func(changes ...*statev1.EntryChange) *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: changes}}}
	}
	create := &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{}}}
	update := &statev1.EntryChange{Action: &statev1.EntryChange_Update{Update: &statev1.Entry{}}}
	remove := &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: "entry/a"}}
	for name, c := range map[string]struct {
		command *statev1.Command
		want    bool
	}{
		"a token":           {&statev1.Command{Body: &statev1.Command_CreateToken{}}, true},
		"a guarded command": {&statev1.Command{Body: &statev1.Command_ApplyObjects{}, IfRevision: 7}, false},
		"new entries":       {entries(create, create), true},
		"an update":         {entries(create, update), false},
		"a delete":          {entries(remove), false},
	} {
		if got := repeatable(c.command); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
