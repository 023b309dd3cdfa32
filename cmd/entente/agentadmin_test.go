package main

import (
	"strings"
	"testing"

	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/meshagent/services"
)

// What the kernel leaves uncertain, and broken registrations, are shown; without them there is no warning.
func TestAgentStatusWarns(t *testing.T) {
	is := &admin.Status{Agent: "h1", TrustDomain: "banking.example", Datacenter: "dc1", Ready: true}
	var out strings.Builder
	if err := printAgentStatus(&out, is); err != nil || strings.Contains(out.String(), "warning") || !strings.Contains(out.String(), "h1 of banking.example in dc1") {
		t.Errorf("%v\n%s", err, out.String())
	}
	is.Skipped, is.TooOld = []string{"Object: field 300"}, []string{"object Service/accounts: methods (level 9)"}
	out.Reset()
	if err := printAgentStatus(&out, is); err != nil || !strings.Contains(out.String(), "skipped, being of a later release: Object: field 300\n") || !strings.Contains(out.String(), "too old to enforce object Service/accounts: methods (level 9): upgrade it\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
	is.AttestationGap, is.Broken = "this kernel is old", []services.Broken{{File: "x.yaml", Why: "no such key"}}
	out.Reset()
	if err := printAgentStatus(&out, is); err != nil || !strings.Contains(out.String(), "warning: this kernel is old\n") || !strings.Contains(out.String(), "warning: x.yaml: no such key\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// The CA node that the agent follows is shown with those it is compared with, and that there is none.
func TestAgentStatusComparison(t *testing.T) {
	for want, is := range map[string]admin.CAStatus{
		"-":                              {},
		"ca-1, compared with ca-2, ca-3": {Node: "ca-1", Compared: []string{"ca-2", "ca-3"}},
		"ca-1, compared with no other: this host has heard one CA node only": {Node: "ca-1"},
	} {
		var out strings.Builder
		if err := printAgentStatus(&out, &admin.Status{CA: is}); err != nil || !strings.Contains(out.String(), "CA NODE       "+want+"\n") {
			t.Errorf("%v: %v\n%s", is, err, out.String())
		}
	}
}
