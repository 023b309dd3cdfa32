package domain

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Every command has a row, and its row says what the audit log names.
func TestEveryCommandHasARow(t *testing.T) {
	const silent = "init tick checksum stage_objects apply_staged approve_change " // approve_change: what it approves
	for i := range bodies.Fields().Len() {
		field := bodies.Fields().Get(i)
		cmd := &statev1.Command{}
		cmd.ProtoReflect().Set(field, protoreflect.ValueOfMessage(cmd.ProtoReflect().NewField(field).Message()))
		d, known := describe(cmd)
		if !known || d.apply == nil {
			t.Errorf("%s: add a row to describe (commands.go)", field.Name())
			continue
		}
		if (d.about == nil) != contains(silent, string(field.Name())) {
			t.Errorf("%s: what does the audit log name? Say it in about (commands.go)", field.Name())
		}
		if (d.forward == OfItself) != (d.member != nil) {
			t.Errorf("%s: which CA node is it about? Say it in member (commands.go)", field.Name())
		}
	}
	if _, known := describe(&statev1.Command{}); known {
		t.Error("a command without a body has a row")
	}
}

// Commands that came with a feature level or after it need it; before levels there were these.
func TestLaterCommandsNeedALevel(t *testing.T) {
	const first = "init create_token join_member update_member remove_member attest_agent prepare_authority authority_ready activate_authority apply_objects " +
		"store_foreign_bundle tick checksum taint_authority authority_drained revoke_authority ban_agent evict_agent revoke_token change_entries promote_member "
	for i := range bodies.Fields().Len() {
		field := bodies.Fields().Get(i)
		cmd := &statev1.Command{}
		cmd.ProtoReflect().Set(field, protoreflect.ValueOfMessage(cmd.ProtoReflect().NewField(field).Message()))
		if level := levelOf(cmd); (level == 1) != contains(first, string(field.Name())) {
			t.Errorf("%s: it needs level %d; members of a release that has no such command must not be sent it", field.Name(), level)
		}
	}
}

func contains(words, word string) bool { return slices.Contains(strings.Fields(words), word) }
