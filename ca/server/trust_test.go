package server_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
)

// auditLines are the lines of a node's audit log.
func auditLines(t *testing.T, c *catest.CA) (lines []map[string]any, raw []byte) {
	t.Helper()
	raw, err := os.ReadFile(c.Config().Audit.File)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(raw) {
		one := map[string]any{}
		if err := json.Unmarshal(line, &one); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		lines = append(lines, one)
	}
	return lines, raw
}

// Every administrative act and every SVID stands in the audit log, refusals too, and no
// secret does (I1).
func TestAudit(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	text := c.AgentToken("h1", "dc1")
	token, key := parseToken(t, text), newKey(t)
	conn := dial(t, c, nil)
	resp, err := ententev1.NewAttestClient(conn).Attest(t.Context(), attestRequest(t, token, key, exporter(t, conn)))
	if err != nil {
		t.Fatal(err)
	}
	host := dial(t, c, tlsCertificate(resp.GetCertificates(), key))
	cert, err := sign(t, host, "service/accounts", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	leaf := parseLeaf(t, cert.Certificate[0])
	other := dial(t, c, nil)
	_, err = ententev1.NewAttestClient(other).Attest(t.Context(), attestRequest(t, token, newKey(t), exporter(t, other)))
	wantCode(t, "control: a spent token", err, codes.PermissionDenied)
	unused := c.AgentToken("h7", "dc1")
	admin := c.Admin()
	if _, err := admin.RevokeToken(t.Context(), &ententev1.RevokeTokenRequest{Id: parseToken(t, unused).ID}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"}); err != nil {
		t.Fatal(err)
	}
	_, err = admin.EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "nobody"})
	wantCode(t, "control: evict nobody", err, codes.NotFound)
	if _, err := admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{
		{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{Id: "entry/a", Path: "/a", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}}}},
		{Action: &statev1.EntryChange_Delete{Delete: "service/accounts"}},
	}}); err != nil {
		t.Fatal(err)
	}
	_, err = admin.TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: "ffff"})
	wantCode(t, "control: taint nothing", err, codes.NotFound)

	lines, raw := auditLines(t, c)
	find := func(want map[string]string) {
		t.Helper()
		for _, line := range lines {
			all := true
			for key, value := range want {
				all = all && strings.Contains(fmt.Sprint(line[key]), value)
			}
			if all {
				return
			}
		}
		t.Errorf("no line with %v in\n%s", want, raw)
	}
	operator := fmt.Sprintf("uid %d", os.Getuid())
	find(map[string]string{"kind": "act", "who": operator, "what": "Apply", "on": "created Service/accounts", "result": "done", "revision": "0."})
	find(map[string]string{"what": "CreateToken", "who": operator, "on": "agent/h1"})
	find(map[string]string{"what": "Attest", "who": "a client without certificate", "on": "agent/h1", "result": "done"})
	find(map[string]string{"what": "Attest", "on": "token/" + token.ID, "result": "refused", "reason": "token-spent"})
	find(map[string]string{"kind": "x509-svid", "who": "h1", "spiffe_id": "spiffe://banking.example/accounts", "entry": "service/accounts",
		"serial": leaf.SerialNumber.Text(16), "authority": fmt.Sprintf("%x", leaf.AuthorityKeyId), "not_after": leaf.NotAfter.UTC().Format(time.RFC3339)})
	find(map[string]string{"kind": "x509-svid", "who": "h1", "spiffe_id": "spiffe://banking.example/entente/agent/h1"})
	find(map[string]string{"kind": "x509-svid", "who": "CA node ca-1", "spiffe_id": "spiffe://banking.example/entente/ca/ca-1"})
	find(map[string]string{"who": "CA node ca-1", "what": "PrepareAuthority"})
	find(map[string]string{"who": "CA node ca-1", "what": "AuthorityReady"})
	find(map[string]string{"who": "CA node ca-1", "what": "ActivateAuthority"})
	find(map[string]string{"what": "RevokeToken", "who": operator, "result": "done"})
	find(map[string]string{"what": "BanAgent", "on": "agent/h1", "result": "done"})
	find(map[string]string{"what": "EvictAgent", "on": "agent/nobody", "result": "refused"})
	find(map[string]string{"what": "ChangeEntries", "on": "created entry/a"})
	find(map[string]string{"what": "ChangeEntries", "on": "refused service/accounts"})
	find(map[string]string{"what": "TaintAuthority", "result": "refused"})
	for _, secret := range []string{text, unused, string(token.Seed), fmt.Sprintf("%x", token.Seed)} {
		if bytes.Contains(raw, []byte(secret)) {
			t.Error("the audit log holds a token")
		}
	}
	if info, err := os.Stat(c.Config().Audit.File); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// The doors refuse selectors that say which program it is and not whose process, with where they stand.
func TestDoorsRefuseUnanchoredSelectors(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	weak := []string{"unix:sha256:" + strings.Repeat("a", 64)}
	anchored := append([]string{"unix:uid:1000"}, weak...)
	for _, selectors := range [][]string{anchored, weak} {
		good := len(selectors) == 2
		for _, dry := range []bool{true, false} {
			e := &statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: selectors}
			change := &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: e}}
			if !good {
				change = &statev1.EntryChange{Action: &statev1.EntryChange_Update{Update: e}}
			}
			r, err := c.Admin().ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{change}, DryRun: dry})
			if err != nil || (r.GetResults()[0].GetCode() == 0) != good {
				t.Errorf("entry with %q: %v %v", selectors, r, err)
			}
			o := &statev1.Object{Source: "x.yaml:3", Owner: "team", Kind: &statev1.Object_Service{Service: &statev1.Service{Name: "y", Path: "/y", Hosts: []string{"h1"}, Selectors: selectors}}}
			_, err = c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{o}, DryRun: dry})
			if good != (err == nil) || !good && (!strings.Contains(err.Error(), "x.yaml:3: Service/y") || !strings.Contains(err.Error(), "add unix:uid")) {
				t.Errorf("Service with %q: %v", selectors, err)
			}
		}
	}
}

// Many entries: groups, pages, filters.
func TestEntriesInBulk(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	admin := c.Admin()
	const n = 2500
	var changes []*statev1.EntryChange
	for i := range n {
		changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{
			Id: fmt.Sprintf("entry/job-%04d", i), Path: fmt.Sprintf("/batch/%d/job", i), Hosts: []string{fmt.Sprintf("b%d", i%10)}, Selectors: []string{"unix:uid:1000"},
		}}})
	}
	dry, err := admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: changes, DryRun: true})
	if err != nil || len(dry.GetResults()) != n || dry.GetResults()[7].GetAction() != "created" {
		t.Fatalf("dry run: %v", err)
	}
	count := func(req *ententev1.ListEntriesRequest) uint64 {
		t.Helper()
		r, err := admin.CountEntries(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return r.GetEntries()
	}
	if got := count(&ententev1.ListEntriesRequest{}); got != 3 {
		t.Fatalf("%d entries after a dry run", got)
	}
	begin := time.Now()
	r, err := admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: changes})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d entries in %v", n, time.Since(begin))
	for i, result := range r.GetResults() {
		if result.GetAction() != "created" || result.GetRevision() == 0 || result.GetId() != changes[i].GetCreate().GetId() {
			t.Fatalf("%v", result)
		}
	}
	for _, test := range []struct {
		req  *ententev1.ListEntriesRequest
		want uint64
	}{
		{&ententev1.ListEntriesRequest{}, n + 3},
		{&ententev1.ListEntriesRequest{Declared: true}, n},
		{&ententev1.ListEntriesRequest{Host: "b3"}, n / 10},
		{&ententev1.ListEntriesRequest{PathPrefix: "/batch/1"}, 1},
		{&ententev1.ListEntriesRequest{PathPrefix: "/batch/"}, n},
		{&ententev1.ListEntriesRequest{PathPrefix: "/batc"}, 0},
	} {
		if got := count(test.req); got != test.want {
			t.Errorf("%v: %d entries, want %d", test.req, got, test.want)
		}
		var ids []string
		for more := true; more; {
			page, err := admin.ListEntries(t.Context(), &ententev1.ListEntriesRequest{
				PageSize: 700, After: lastOf(ids), Host: test.req.Host, PathPrefix: test.req.PathPrefix, Declared: test.req.Declared,
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.GetEntries() {
				ids = append(ids, e.GetId())
			}
			if more = page.GetMore(); more && len(page.GetEntries()) != 700 {
				t.Fatalf("a page of %d", len(page.GetEntries()))
			}
		}
		if uint64(len(ids)) != test.want || !slices.IsSorted(ids) || len(slices.Compact(ids)) != len(ids) {
			t.Errorf("%v: listed %d", test.req, len(ids))
		}
	}
	// Compare-and-swap on one entry's revision; its neighbours in the batch are not held up.
	e, err := admin.GetEntry(t.Context(), &ententev1.GetEntryRequest{Id: "entry/job-0001"})
	if err != nil {
		t.Fatal(err)
	}
	next := e.GetEntry()
	next.Hint = "nightly"
	r, err = admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{
		{Action: &statev1.EntryChange_Update{Update: next}, IfRevision: next.GetRevision()},
		{Action: &statev1.EntryChange_Delete{Delete: "entry/job-0002"}, IfRevision: next.GetRevision() + 1<<20},
		{Action: &statev1.EntryChange_Delete{Delete: "entry/job-0003"}},
		{Action: &statev1.EntryChange_Delete{Delete: "entry/job-0003"}},
		changes[4],
	}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, result := range r.GetResults() {
		got = append(got, result.GetAction()+codes.Code(result.GetCode()).String())
	}
	if want := []string{"updatedOK", "Aborted", "deletedOK", "InvalidArgument", "unchangedOK"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	_, err = admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: make([]*statev1.EntryChange, 20_001)})
	wantCode(t, "too many", err, codes.InvalidArgument)
	_, err = admin.GetEntry(t.Context(), &ententev1.GetEntryRequest{Id: "entry/none"})
	wantCode(t, "none", err, codes.NotFound)
}

func lastOf(ids []string) string {
	if len(ids) == 0 {
		return ""
	}
	return ids[len(ids)-1]
}

// None of what ends trust is to be had over TCP, whoever asks; the control is the socket.
func TestTrustDoorsAreLocal(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	cert := attest(t, c, "h1")
	if _, err := c.Admin().ListAgents(t.Context(), &ententev1.ListAgentsRequest{}); err != nil {
		t.Fatalf("control: %v", err)
	}
	host := dial(t, c, &cert)
	admin, peers := ententev1.NewAdminClient(host), ententev1.NewPeerClient(host)
	for name, call := range map[string]func(context.Context) error{
		"ban": func(ctx context.Context) error {
			_, err := admin.BanAgent(ctx, &ententev1.ChangeAgentRequest{Name: "h1"})
			return err
		},
		"revoke": func(ctx context.Context) error {
			_, err := admin.RevokeAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: "0000"})
			return err
		},
		"remove": func(ctx context.Context) error {
			_, err := admin.RemoveNode(ctx, &ententev1.RemoveNodeRequest{Name: "ca-1"})
			return err
		},
		"gate": func(ctx context.Context) error { _, err := peers.Gate(ctx, &ententev1.GateRequest{}); return err },
	} {
		err := call(t.Context())
		if err == nil {
			t.Errorf("%s: an agent may", name)
		}
	}
}

// What an operator does to tokens and agents, and the order that is refused.
func TestTokensAndAgents(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	attest(t, c, "h1")
	attest(t, c, "h2")
	admin := c.Admin()
	tokens, err := admin.ListTokens(t.Context(), &ententev1.ListTokensRequest{})
	if err != nil || len(tokens.GetTokens()) != 2 || tokens.GetTokens()[0].GetUsedBy() == "" {
		t.Fatalf("%v, %v", tokens, err)
	}
	_, err = admin.RevokeToken(t.Context(), &ententev1.RevokeTokenRequest{Id: tokens.GetTokens()[0].GetId()})
	wantCode(t, "a used token", err, codes.PermissionDenied)
	page, err := admin.ListAgents(t.Context(), &ententev1.ListAgentsRequest{PageSize: 1})
	if err != nil || len(page.GetAgents()) != 1 || page.GetAgents()[0].GetAgent().GetName() != "h1" || !page.GetMore() || page.GetAgents()[0].GetEntries() != 1 {
		t.Errorf("%v, %v", page, err)
	}
	page, err = admin.ListAgents(t.Context(), &ententev1.ListAgentsRequest{PageSize: 1, After: "h1"})
	if err != nil || len(page.GetAgents()) != 1 || page.GetAgents()[0].GetAgent().GetName() != "h2" || page.GetMore() {
		t.Errorf("%v, %v", page, err)
	}
	shown, err := admin.GetAgent(t.Context(), &ententev1.GetAgentRequest{Name: "h2"})
	if err != nil || len(shown.GetEntries()) != 2 || shown.GetStatus().GetHere() {
		t.Errorf("%v, %v", shown, err)
	}
	_, err = admin.GetAgent(t.Context(), &ententev1.GetAgentRequest{Name: "h9"})
	wantCode(t, "nobody", err, codes.NotFound)
	_, err = admin.RemoveNode(t.Context(), &ententev1.RemoveNodeRequest{Name: "ca-1"})
	wantCode(t, "the last voter", err, codes.FailedPrecondition)
	_, err = admin.RemoveNode(t.Context(), &ententev1.RemoveNodeRequest{Name: "ca-9"})
	wantCode(t, "no node", err, codes.NotFound)
	_, err = admin.TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: ""})
	wantCode(t, "no id", err, codes.InvalidArgument)
}

func tlsCertificate(chain [][]byte, key crypto.Signer) *tls.Certificate {
	return &tls.Certificate{Certificate: chain, PrivateKey: key}
}

func parseLeaf(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}
