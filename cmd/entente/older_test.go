package main

import (
	"testing"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// `ca status` says of a subscriber first what it cannot enforce.
func TestOlderText(t *testing.T) {
	for want, o := range map[string]*ententev1.SubscriberLevel{
		"OLDER\tagent h1 (level 0)":                         {Name: "agent h1"},
		"OLDER\tagent h1 (level 1) skips Object: field 300": {Name: "agent h1", Level: 1, Skipped: []string{"Object: field 300"}},
		"TOO OLD\tagent h1 (level 1) cannot enforce object Service/a: methods (level 2): upgrade it": {
			Name: "agent h1", Level: 1, TooOld: []string{"object Service/a: methods (level 2)"}, Skipped: []string{"Service: field 300"},
		},
	} {
		if got := olderText(o); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
