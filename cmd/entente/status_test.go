package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
)

// What `ca status` has to say, to people and to programs, with quorum and without: quorum
// and since when there is none, ages, authorities and how long they last alone, who has
// not acknowledged, the disk, the clock.
func TestStatus(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	other := c.Join("ca-2", "dc2")
	agent, err := client.New(client.Config{TrustDomain: c.TrustDomain(), Addresses: []string{c.Config().Listen.API}, SVID: attestHost(t, c, c.AgentToken("h1", "dc1")), Bundles: c.Bundle()})
	if err != nil {
		t.Fatal(err)
	}
	var deaf atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Sync(ctx, func(*client.View) error {
			if deaf.Load() {
				return errors.New("its workloads do not hold it")
			}
			return nil
		})
	}()
	defer func() { cancel(); <-ended }()

	shown := func() (text string, fields map[string]any, err error) {
		text, code := entente(t, "ca", "status", "--socket", c.Socket())
		raw, codeJSON := entente(t, "ca", "status", "--json", "--socket", c.Socket())
		if code != exitOK || codeJSON != exitOK {
			return text, nil, fmt.Errorf("exit codes %d, %d: %s", code, codeJSON, raw)
		}
		return text, fields, json.Unmarshal([]byte(raw), &fields)
	}
	// until asks until everything of a moment is there.
	until := func(what string, lines []string, holds func(map[string]any) error) {
		t.Helper()
		for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			text, fields, err := shown()
			for _, line := range lines {
				if err == nil && !regexp.MustCompile(`(?m)^`+line).MatchString(text) {
					err = fmt.Errorf("no line %q", line)
				}
			}
			if err == nil {
				err = holds(fields)
			}
			if err == nil {
				return
			}
			if time.Since(begin) > time.Minute {
				t.Fatalf("%s: %v in\n%s", what, err, text)
			}
		}
	}
	const autonomy = `ca-1 +dc1 +(leader|voter) +\S+ +[0-9a-f]{8} +\d{4}-\S+ +for \d+\.\d d`
	uses := func(next string) (lines []string) {
		for _, use := range []string{"X509", "JWT", "WIT"} {
			for _, node := range []string{"ca-1", "ca-2"} {
				lines = append(lines, node+" +"+use+` +[0-9a-f]{8} +\d+\.\d d +[0-9a-f]{8} +\d+\.\d d +`+next)
			}
		}
		return lines
	}
	// common is what both moments show.
	common := func(fields map[string]any) error {
		age, _ := fields["ageSeconds"].(float64)
		offset, _ := fields["clockOffsetSeconds"].(float64)
		members, _ := fields["members"].([]any)
		alone, _ := fields["autonomy"].([]any)
		switch {
		case age < 0 || fields["clockKnown"] != true || offset < -5 || offset > 5 || fields["disk"] != "":
			return fmt.Errorf("age %v, clock %v %v, disk %v", fields["ageSeconds"], fields["clockKnown"], offset, fields["disk"])
		case len(members) != 2 || len(alone) != 2:
			return fmt.Errorf("%d members, autonomy of %d", len(members), len(alone))
		}
		for _, a := range alone {
			a := a.(map[string]any)
			signs, _ := a["signsSeconds"].(float64)
			if uses, _ := a["uses"].([]any); signs < 24*3600 || len(uses) != 3 {
				return fmt.Errorf("autonomy %v", a)
			}
		}
		return nil
	}

	until("with quorum", append(uses("by everybody"), `DOMAIN +banking\.example`, `STATE +quorum, leader ca-[12]; epoch 0, revision 0\.\d+, \d+\.\d s old`,
		`DISK +works; log at entry \d+, applied \d+, \d+ KiB`, `AUDIT +\S+/audit\.log, 0 of 1024 MiB; on the file system of the replicated log`, `CLOCK +[+-]\d+\.\d{3} s from the agreed time`, `SUBSCRIBERS +1 here; all have acknowledged`,
		autonomy, `ca-2 +dc2 +(leader|voter)`),
		func(fields map[string]any) error {
			if waiting, _ := fields["waitingFor"].([]any); fields["quorum"] != true || fields["noQuorumSince"] != "0" || len(waiting) != 0 || fields["notAgreeing"] != "" {
				return fmt.Errorf("quorum %v since %v, waiting for %v", fields["quorum"], fields["noQuorumSince"], waiting)
			}
			return common(fields)
		})

	// One host does not take what is new, and one node is gone, for good or not.
	deaf.Store(true)
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: 1000, hosts: [h1]}, port: 8080}\n")
	lost := time.Now()
	other.Kill()
	until("without quorum", append(uses(`(by everybody|\?)`), `STATE +NO QUORUM since \S+.*; epoch 0, revision 0\.\d+, \d+\.\d s old`,
		`DISK +works`, `CLOCK +[+-]\d+\.\d{3} s from the agreed time`, `SUBSCRIBERS +1 here; up to 0\.\d+: waiting for .*h1`,
		`TO DO +no quorum since \S+`, autonomy),
		func(fields map[string]any) error {
			var since int64
			fmt.Sscan(fmt.Sprint(fields["noQuorumSince"]), &since)
			waiting, _ := fields["waitingFor"].([]any)
			todo, _ := fields["notAgreeing"].(string)
			if at := time.Unix(since, 0); fields["quorum"] != false || at.Before(lost.Add(-10*time.Second)) || at.After(time.Now()) || len(waiting) != 1 || !strings.HasPrefix(todo, "no quorum since ") {
				return fmt.Errorf("quorum %v since %v, waiting for %v, %q", fields["quorum"], fields["noQuorumSince"], waiting, todo)
			}
			return common(fields)
		})
}

// What is wrong stands there in words.
func TestStatusOfTrouble(t *testing.T) {
	var out bytes.Buffer
	id := strings.Repeat("ab", 32)
	if err := printStatus(&out, &ententev1.StatusResponse{
		AgeSeconds: -1, NoQuorumSince: 1, Disk: "no space left on device", Entries: 5, WeakEntries: 2,
		Members: []*ententev1.MemberStatus{{Member: &statev1.Member{Id: "n", Name: "ca-1"}}, {Member: &statev1.Member{Id: "w", Name: "witness"}}},
		Autonomy: []*ententev1.Autonomy{{MemberId: "n", SignsSeconds: 3600 * 30, FullSeconds: 3600 * 20, Uses: []*ententev1.UseAutonomy{
			{Use: statev1.KeyUse_KEY_USE_JWT, Active: id, ActiveSeconds: 60, Next: id, NextSeconds: 90, Overdue: true, WaitingFor: []string{"agent h7"}},
			{Use: statev1.KeyUse_KEY_USE_WIT, Next: id, WaitingUnknown: true},
		}}},
		Foreign: []*ententev1.ForeignBundleStatus{{TrustDomain: "trading.example", AgeSeconds: -1, Error: "refused", Dropped: []*ententev1.DroppedKey{
			{Id: id, Use: "jwt-svid", BecauseOf: "insurance.example", Reason: "the key has signed that it belongs to insurance.example"}, {Reason: "unreadable"},
		}}},
	}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`WEAK +2 of these entries name no user, unit or container, .*: entente entry list --weak shows them; add unix:uid`,
		`STATE +NO QUORUM since .*of unknown age`, `DISK +FAILED: no space left on device`, `CLOCK +not known`,
		`ca-1 .*for 30\.0 h, full life for 20\.0 h`, `witness .*no: a witness`, `ca-1 +JWT +abababab +1m0s +abababab +1m30s +OVERDUE: not yet by agent h7`,
		`ca-1 +WIT +none .*\?`, `trading\.example .*not by this node +refused`,
		`FEDERATED +REJECTED KEY +USE +BECAUSE OF +REASON`, `trading\.example +abababababab +jwt-svid +insurance\.example +the key has signed`, `trading\.example +- +- +- +unreadable`,
	} {
		if !regexp.MustCompile(`(?m)^` + line).MatchString(out.String()) {
			t.Errorf("no line %q in\n%s", line, out.String())
		}
	}
}
