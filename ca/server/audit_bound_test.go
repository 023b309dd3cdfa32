package server_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// boundedDisk is a disk with a bound on what the log may have of it.
type boundedDisk struct {
	disk
	bound int64
}

func (b *boundedDisk) Room() (left, bound int64) { return b.bound - int64(b.text.Len()), b.bound }

// tally is what an audit log says of SVIDs and acts.
type tally struct {
	svids, counted map[string]int64 // by entry
	totals         int64            // of several entries
	acts           []string
	counts         int // lines
}

func tallyOf(t *testing.T, text string) tally {
	t.Helper()
	all := tally{svids: map[string]int64{}, counted: map[string]int64{}}
	for line := range strings.Lines(text) {
		var one struct {
			Kind, What, Entry, Of string
			Number                int64
			More                  bool
		}
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			continue // torn by a full disk
		}
		switch {
		case one.Kind == "jwt-svid":
			all.svids[one.Entry]++
		case one.Kind == "count" && one.More:
			all.totals, all.counts = all.totals+one.Number, all.counts+1
		case one.Kind == "count":
			all.counted[one.Entry], all.counts = all.counted[one.Entry]+one.Number, all.counts+1
		case one.Kind == "act":
			all.acts = append(all.acts, one.What)
		}
	}
	return all
}

func token(entry string, audience ...string) signer.Issued {
	return signer.Issued{
		Kind: "jwt-svid", ID: spiffeid.RequireFromString("spiffe://banking.example/" + entry), Audience: audience,
		Origin: ca.Origin{Entry: entry, Agent: "h1"}, Digest: strings.Repeat("0", 64), Authority: "41d0", NotAfter: time.Now(),
	}
}

// At the bound SVIDs become counts for each entry and minute, whose sum is right, and
// every act still has its line; with room again SVIDs have lines again.
func TestAuditAtItsBoundCountsSVIDsAndKeepsActs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		file := &boundedDisk{disk{left: -1}, 64 << 10}
		audit := server.NewAudit(file, "ca-1", false, slog.New(slog.NewTextHandler(&log, nil)), nil)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- audit.Run(ctx) }()

		const each = 2000
		for i := range each {
			for _, entry := range []string{"a", "b"} {
				audit.Issued(token(entry), 1)
			}
			if i == 0 && (audit.Problem() != nil || tallyOf(t, file.text.String()).svids["a"] != 1) {
				t.Fatal("control: SVIDs have no lines where there is room")
			}
		}
		for i := range 20 {
			audit.Act("somebody", fmt.Sprint("act-", i), nil, 0, nil)
		}
		time.Sleep(61 * time.Second)
		synctest.Wait()
		got := tallyOf(t, file.text.String())
		for _, entry := range []string{"a", "b"} {
			if sum := got.svids[entry] + got.counted[entry]; sum != each || got.counted[entry] == 0 {
				t.Errorf("entry %s: %d lines and %d counted, %d together", entry, got.svids[entry], got.counted[entry], sum)
			}
		}
		if got.counts != 2 {
			t.Errorf("%d lines of counts for one minute and two entries", got.counts)
		}
		if len(got.acts) != 20 {
			t.Errorf("%d of 20 acts", len(got.acts))
		}
		if size := int64(file.text.Len()); size > file.bound*7/8 {
			t.Errorf("SVIDs, counts and 20 acts have %d bytes of %d", size, file.bound)
		}
		if audit.Problem() == nil || strings.Count(log.String(), "no longer recorded one by one") != 1 {
			t.Errorf("problem %v; log:\n%s", audit.Problem(), log.String())
		}

		// Counts for ever fill no more than their part; acts have theirs, and what is
		// beyond the bound goes to the process's log.
		for minute := range 600 {
			audit.Issued(token(fmt.Sprint("e", minute%7)), 1)
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		if size := int64(file.text.Len()); size > file.bound*15/16 {
			t.Errorf("counts have all but %d bytes", file.bound-size)
		}
		for i := range 500 {
			audit.Act("somebody", fmt.Sprint("late-", i), nil, 0, nil)
		}
		if size := int64(file.text.Len()); size > file.bound {
			t.Errorf("%d bytes, over the bound", size)
		}
		got = tallyOf(t, file.text.String())
		for i := range 500 {
			what := fmt.Sprint("late-", i)
			if !slices.Contains(got.acts, what) && !strings.Contains(log.String(), `\"what\":\"`+what+`\"`) {
				t.Fatalf("%s is neither in the audit log nor in the process's", what)
			}
		}

		file.bound *= 4 // somebody moved files away
		audit.Issued(token("a"), 1)
		audit.Act("somebody", "after", nil, 0, nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		after := tallyOf(t, file.text.String())
		if audit.Problem() != nil || after.svids["a"] != got.svids["a"]+1 || !strings.Contains(file.text.String(), `"kind":"gap"`) {
			t.Errorf("with room again: %v, %d lines of a after %d", audit.Problem(), after.svids["a"], got.svids["a"])
		}
		sum := after.totals
		for _, counts := range []map[string]int64{after.svids, after.counted} {
			for _, n := range counts {
				sum += n
			}
		}
		if want := int64(2*each + 600 + 1); sum != want {
			t.Errorf("the log accounts for %d SVIDs of %d", sum, want)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A full disk costs SVIDs their lines and not their number.
func TestAuditOnAFullDiskCountsSVIDs(t *testing.T) {
	file := &disk{left: -1}
	audit := server.NewAudit(file, "ca-1", false, slog.New(slog.DiscardHandler), nil)
	audit.Issued(token("a"), 1)
	file.left = 30
	for range 10 {
		audit.Issued(token("a"), 1)
	}
	audit.Flush()
	file.left = -1
	audit.Flush()
	if got := tallyOf(t, file.text.String()); got.svids["a"] != 1 || got.counted["a"]+got.totals != 10 {
		t.Errorf("%+v in\n%s", got, file.text.String())
	}
}

// What a caller chooses makes no line long.
func TestAuditWritesLongAudiencesByHash(t *testing.T) {
	file := &disk{left: -1}
	audit := server.NewAudit(file, "ca-1", false, slog.New(slog.DiscardHandler), nil)
	long := strings.Repeat("\u2028", 1350)
	audit.Issued(token("a", "ledger", long), 1)
	many := slices.Repeat([]string{strings.Repeat("x", 100)}, 16)
	audit.Issued(token("a", many...), 1)
	var lines []struct{ Audience []string }
	for line := range strings.Lines(file.text.String()) {
		if len(line) > 1200 {
			t.Errorf("a line of %d bytes", len(line))
		}
		var one struct{ Audience []string }
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, one)
	}
	want := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(long)))
	if got := lines[0].Audience; len(got) != 2 || got[0] != "ledger" || got[1] != want {
		t.Errorf("audience %q", got)
	}
	if got := lines[1].Audience; len(got) != 1 || !strings.HasPrefix(got[0], "16 audiences, sha256:") {
		t.Errorf("audience %q", got)
	}
}

// Who is refused again and again fills nothing; another caller's refusals have lines.
func TestAuditOfOneCallersRefusalsHasARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := &disk{left: -1}
		audit := server.NewAudit(file, "ca-1", false, slog.New(slog.DiscardHandler), nil)
		no := status.Error(codes.PermissionDenied, "no")
		for range 10_000 {
			audit.Refused("spiffe://banking.example/mallory", "spiffe://banking.example/mallory", "BanAgent", nil, no)
		}
		audit.Refused("spiffe://banking.example/ann", "spiffe://banking.example/ann", "BanAgent", nil, no)
		audit.Flush()
		text := file.text.String()
		if lines := strings.Count(text, "\n"); lines > 150 {
			t.Errorf("%d lines", lines)
		}
		if !strings.Contains(text, `"of":"refused","number":9900,"who":"spiffe://banking.example/mallory","what":"BanAgent"`) {
			t.Errorf("refusals are not counted: %s", text[max(0, len(text)-400):])
		}
		if !strings.Contains(text, `"who":"spiffe://banking.example/ann","what":"BanAgent"`) {
			t.Error("control: another caller's refusal has no line")
		}
	})
}

// wholeRun skips a test under -short that counts what thousands of calls leave behind: they
// come one after the other, so that the race detector finds nothing in them that it does not
// find in one.
func wholeRun(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("thousands of calls, one after the other: for the whole run")
	}
}

// Who changes nothing, however often and however much he asks for, has no line for it.
func TestWhoChangesNothingFillsNothing(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	f := newOffice(t, catest.Options{})
	vic, pia := f.as("vic"), f.as("pia")
	f.entry(pia, "mine", "/team/pay/job", "h1", 4000)
	deletes := func(changes []*statev1.EntryChange) *ententev1.ChangeEntriesRequest {
		for i := range 1000 {
			changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: fmt.Sprintf("entry/%0150d", i)}})
		}
		return &ententev1.ChangeEntriesRequest{Changes: changes}
	}
	same := &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{Action: &statev1.EntryChange_Update{Update: &statev1.Entry{Id: "entry/mine", Path: "/team/pay/job", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:4000"}}}}}}
	const times = 120
	for what, ask := range map[string]func() error{
		"a viewer deletes what is not there": func() error {
			_, err := vic.ChangeEntries(t.Context(), deletes(nil))
			return err
		},
		"an owner asks for what is so": func() error {
			_, err := pia.ChangeEntries(t.Context(), same)
			return err
		},
	} {
		_, audit := logged(t, f.ca, func() {
			for range times {
				if err := ask(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
		})
		if audit == 0 || audit > 1_500_000 {
			t.Errorf("%d times %s: %d bytes of audit log", times, what, audit)
		}
	}
	// Control: what was changed is named, and how much beside it was refused.
	if _, err := pia.ChangeEntries(t.Context(), deletes([]*statev1.EntryChange{change("mine2", "/team/pay/job2", "h1", 4001)})); err != nil {
		t.Fatal(err)
	}
	_, raw := auditLines(t, f.ca)
	line := string(raw[strings.LastIndex(strings.TrimSpace(string(raw)), "\n")+1:])
	if !strings.Contains(line, `"created entry/mine2"`) || !strings.Contains(line, `"refused 980 more"`) || len(line) > 12_000 {
		t.Errorf("control: %d bytes: %.300s", len(line), line)
	}
}

// An administrator of a prefix cannot use up the room for acts: others go on, also where
// the log is required, and he takes away what he likes.
func TestOwnerCannotFillTheAuditLog(t *testing.T) {
	t.Parallel()
	const bound = 1 << 20
	c := catest.Prepare(t, catest.Options{})
	c.Config().Audit = node.Audit{File: filepath.Join(t.TempDir(), "audit.log"), MaxSize: yamlfile.Size{Bytes: bound}, Required: true}
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	f := openOffice(t, c)
	attest(t, c, "h1")
	pia, tom := f.as("pia"), f.as("tom")
	const many = 400
	changes := func(hint string, update bool) *ententev1.ChangeEntriesRequest {
		req := &ententev1.ChangeEntriesRequest{}
		for i := range many {
			one := change(fmt.Sprintf("mine-%050d", i), fmt.Sprint("/team/pay/", i), "h1", 5000+i)
			if e := one.GetCreate(); update {
				e.Hint = hint
				one.Action = &statev1.EntryChange_Update{Update: e}
			}
			req.Changes = append(req.Changes, one)
		}
		return req
	}
	code := codes.OK
	ask := func(req *ententev1.ChangeEntriesRequest) {
		t.Helper()
		resp, err := pia.ChangeEntries(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		code = codes.Code(resp.GetResults()[0].GetCode())
		if code != codes.OK {
			t.Log(resp.GetResults()[0].GetError())
		}
	}
	ask(changes("", false))
	if code != codes.OK {
		t.Fatalf("control: an owner may not act: %v", code)
	}
	for i := 0; i < 100 && code == codes.OK; i++ {
		ask(changes(fmt.Sprint(i), true))
	}
	if code != codes.ResourceExhausted {
		t.Errorf("an owner who fills the audit log: %v", code)
	}
	for what, err := range map[string]error{
		"an owner takes away": changeOne(t, pia, &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: fmt.Sprintf("entry/mine-%050d", 0)}}),
		"a trust-admin adds":  changeOne(t, tom, change("x", "/team/payments/x", "h1", 9001)),
		"an operator adds":    changeOne(t, c.Admin(), change("y", "/team/payments/y", "h1", 9002)),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := tom.BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"}); err != nil {
		t.Errorf("a trust-admin bans: %v", err)
	}
	if problem := c.Status().GetAudit().GetProblem(); strings.Contains(problem, "missing") {
		t.Error(problem)
	}
}

// One entry's tokens have a rate on each host; the other entries of that host, also in the
// same call, and that entry on another host have their own.
func TestTokenRateOfAnEntry(t *testing.T) {
	t.Parallel()
	c := startWithLimits(t, node.Limits{TokensPerEntry: yamlfile.Rate{PerSecond: 1}})
	host := attest(t, c, "h1")
	sign := ententev1.NewSignClient(dial(t, c, &host))
	ask := func(entries ...string) (*ententev1.SignJWTResponse, error) {
		req := &ententev1.SignJWTRequest{}
		for _, entry := range entries {
			req.Requests = append(req.Requests, &ententev1.JWTRequest{EntryId: entry, Audience: []string{"ledger"}})
		}
		return sign.SignJWT(t.Context(), req)
	}
	const greedy, other = "service/accounts", "service/teller"
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: teller}\nspec: {run: {uid: 1003, hosts: [h1]}, port: 8083}\n")
	if _, err := ask(slices.Repeat([]string{greedy}, 90)...); err != nil {
		t.Fatalf("control: a burst: %v", err)
	}
	var err error
	for calls := 0; err == nil && calls < 50; calls++ {
		_, err = ask(slices.Repeat([]string{greedy}, 50)...)
	}
	wantCode(t, "a greedy entry", err, codes.ResourceExhausted)
	if hint := retryHint(err); hint <= 0 || hint > 3*time.Second {
		t.Errorf("retry hint %v", hint)
	}
	resp, err := ask(append(slices.Repeat([]string{greedy}, 20), other)...)
	if err != nil {
		t.Fatalf("another entry in the same call: %v", err)
	}
	results := resp.GetResults()
	if last := results[20]; last.GetToken() == "" {
		t.Errorf("another entry in the same call: %v", last)
	}
	if r := results[19]; codes.Code(r.GetCode()) != codes.ResourceExhausted || r.GetRetryAfterSeconds() <= 0 {
		t.Errorf("the greedy entry: %v", r)
	}
	wits, err := sign.SignWIT(t.Context(), &ententev1.SignWITRequest{Requests: slices.Repeat([]*ententev1.WITRequest{{EntryId: greedy, Csr: csrOf(t, newKey(t))}}, 50)})
	if results := wits.GetResults(); err == nil && codes.Code(results[len(results)-1].GetCode()) == codes.ResourceExhausted {
		err = status.Error(codes.ResourceExhausted, "some were signed at first")
	}
	wantCode(t, "WIT-SVIDs of the same entry", err, codes.ResourceExhausted)
	if text := metricsOf(t, c); !strings.Contains(text, `entente_ca_limited_total{limit="entry"} `) {
		t.Error("it is not counted")
	}
}

// Tokens without end leave the log's directory within its bound, are all accounted for,
// and cost no administrator's line; `ca status` says how it goes and that the log shares
// the disk of Raft's.
func TestWorkloadCannotFillTheAuditDisk(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	const bound = 1 << 20
	c := catest.Prepare(t, catest.Options{})
	c.Config().Limits = node.Limits{TokensPerEntry: yamlfile.Rate{PerSecond: 100_000}, TokensPerAgent: yamlfile.Rate{PerSecond: 100_000}}
	c.Config().Audit = node.Audit{File: filepath.Join(c.Config().DataDir, "audit.log"), MaxSize: yamlfile.Size{Bytes: bound}}
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	c.Apply(twoHosts)
	if a := c.Status().GetAudit(); a.GetProblem() != "" || a.GetBoundBytes() != bound || !a.GetSharesRaftDisk() {
		t.Errorf("control: status before: %v", a)
	}
	host := attest(t, c, "h1")
	sign := ententev1.NewSignClient(dial(t, c, &host))
	const tokens = 4000
	for n := range tokens / 50 {
		req := &ententev1.SignJWTRequest{}
		for i := range 50 {
			req.Requests = append(req.Requests, &ententev1.JWTRequest{EntryId: "service/accounts", Audience: []string{fmt.Sprint(n, "-", i, strings.Repeat("\u2028", 1350))}})
		}
		if _, err := sign.SignJWT(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: teller}\nspec: {run: {uid: 1003, hosts: [h1]}, port: 8083}\n")
	if a := c.Status().GetAudit(); !strings.Contains(a.GetProblem(), "at its bound") {
		t.Errorf("status: %v", a)
	}
	if text := metricsOf(t, c); !strings.Contains(text, "entente_ca_audit_degraded 1") || !strings.Contains(text, "entente_ca_audit_shares_raft_disk 1") {
		t.Error("the metrics do not say it")
	}
	c.Stop()

	var text strings.Builder
	files, err := filepath.Glob(c.Config().Audit.File + "*")
	if err != nil || len(files) < 2 {
		t.Errorf("files %q, %v", files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(data)
	}
	if text.Len() > bound {
		t.Errorf("%d bytes in %d files, over the bound", text.Len(), len(files))
	}
	got := tallyOf(t, text.String())
	if sum := got.svids["service/accounts"] + got.counted["service/accounts"]; sum != tokens || got.counted["service/accounts"] == 0 {
		t.Errorf("%d lines and %d counted of %d tokens", got.svids["service/accounts"], got.counted["service/accounts"], tokens)
	}
	if !strings.Contains(text.String(), `"what":"Apply","on":["created Service/teller"`) {
		t.Error("what an administrator did at the bound is missing")
	}
}
