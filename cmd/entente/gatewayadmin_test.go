package main

import (
	"context"
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
)

// seenGateway answers as a gateway does that sees one service.
type seenGateway struct{ only string }

func (g *seenGateway) Status(r *ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	g.only = r.GetService()
	in := func(d time.Duration) *timestamppb.Timestamp {
		return timestamppb.New(time.Now().Add(d + time.Second/2))
	}
	return &ententev1.DataPlaneStatusResponse{
		Kind: "gateway", Name: "gw-1", TrustDomain: "banking.example", Datacenter: "dc1",
		Build: &ententev1.Build{Version: "v1.2.3", SyncLevel: 1}, Started: in(-26 * time.Hour), NotReady: "no SVID",
		Svids:       []*ententev1.HeldSVID{{SpiffeId: "spiffe://banking.example/entente/gateway/gw-1", NotAfter: in(5 * time.Hour)}},
		Ca:          &ententev1.FollowedCA{Node: "ca-1", Address: "127.1.0.1:7400", Revision: 7, FeatureLevel: 5, Compared: []string{"ca-2", "ca-3"}},
		Bundles:     []*ententev1.HeldBundle{{TrustDomain: "banking.example", X509Authorities: 3, Since: in(-90 * time.Second), FirstExpiry: in(50 * time.Hour)}},
		Listeners:   []*ententev1.Listener{{Name: "eastWest", Address: "127.1.0.2:7600", SpiffeId: "spiffe://banking.example/entente/gateway/gw-1", Connections: 4}},
		Connections: 9, Requests: 2,
		Services: []*ententev1.ServiceView{{Name: "accounts.banking.example", Endpoints: []*ententev1.EndpointView{
			{Name: "h1", Datacenter: "dc1", Address: "127.1.0.3:15008", Healthy: true},
			{Name: "h2", Datacenter: "dc2", Address: "127.1.0.4:15008", Stale: true, Ejected: true},
		}}, {Name: "ledger.banking.example"}},
	}
}

func TestGatewayStatus(t *testing.T) {
	socket, seen := filepath.Join(t.TempDir(), "a.sock"), &seenGateway{}
	if out, code := entente(t, "gateway", "status", "--socket", socket); code != exitUnreachable || !strings.Contains(out, "no gateway answers at "+socket) {
		t.Errorf("no gateway: exit code %d: %s", code, out)
	}
	listener, err := daemon.ListenUnix(socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- dataplaneapi.New(seen, nil, nil).ServeLocal(ctx, listener) }()
	defer func() { cancel(); <-ended }()

	out, code := entente(t, "gateway", "status", "--socket", socket)
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, out)
	}
	for _, line := range []string{
		`GATEWAY +gw-1 of banking.example, dc1`, `BUILD +v1.2.3`, `STATE +NOT READY: no SVID; up 1d[12]h`,
		`IDENTITY +spiffe://banking.example/entente/gateway/gw-1, expires in 5h0m`,
		`CA NODE +ca-1 at 127.1.0.1:7400; revision 0.7, feature level 5`, `COMPARED +with ca-2, ca-3`,
		`TRAFFIC +9 connections, 2 requests under way`, `eastWest +127.1.0.2:7600 +4 +spiffe://`,
		`banking.example +3 +1m\d+s +2d2h`, `accounts.banking.example +h1 +dc1 +127.1.0.3:15008 +healthy`,
		` +h2 +dc2 +127.1.0.4:15008 +UNHEALTHY, stale, EJECTED: unreachable`, `ledger.banking.example +- +- +- +NONE`,
	} {
		if !regexp.MustCompile(`(?m)^` + line).MatchString(out) {
			t.Errorf("no line %q in\n%s", line, out)
		}
	}
	raw, code := entente(t, "gateway", "status", "ledger.banking.example", "--json", "--socket", socket)
	var fields struct{ Name, Started string }
	if err := json.Unmarshal([]byte(raw), &fields); code != exitOK || err != nil || fields.Name != "gw-1" || seen.only != "ledger.banking.example" {
		t.Errorf("exit code %d, %v, asked for %q: %s", code, err, seen.only, raw)
	}
	if _, err := time.Parse(time.RFC3339, fields.Started); err != nil {
		t.Error(err)
	}
	if out, code := entente(t, "sidecar", "status", "ledger.banking.example", "--socket", socket); code != exitOK || !strings.Contains(out, "accounts.banking.example") || seen.only != "ledger.banking.example" {
		t.Errorf("an agent's socket: exit code %d: %s", code, out)
	}
	if out, code := entente(t, "sidecar", "status", "--socket", socket+"x"); code != exitUnreachable || !strings.Contains(out, "no agent answers") {
		t.Errorf("no agent: exit code %d: %s", code, out)
	}
	if _, code := entente(t, "gateway", "status", "one", "two"); code != exitUsage {
		t.Errorf("two services: exit code %d", code)
	}
}

// drainable is a gateway that has fewer requests under way with each look.
type drainable struct {
	mu      sync.Mutex
	drained *dataplane.Drained
	left    uint32
}

func (g *drainable) Drain(why dataplane.Drained) dataplane.Drained {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.drained == nil {
		g.drained = &why
	}
	return *g.drained
}

func (g *drainable) Undrain() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.drained != nil
	g.drained = nil
	return was
}

func (g *drainable) Status(*ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := &ententev1.DataPlaneStatusResponse{Kind: "gateway", Name: "gw-1", Drained: dataplaneapi.Drained(g.drained), Requests: g.left,
		Listeners: []*ententev1.Listener{{Name: "eastWest", Connections: g.left}}}
	if g.left > 0 && g.left < stuck {
		g.left--
	}
	return s
}

const stuck = 1000

func TestGatewayDrain(t *testing.T) {
	socket, g := filepath.Join(t.TempDir(), "a.sock"), &drainable{left: 2}
	listener, err := daemon.ListenUnix(socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- dataplaneapi.New(g, nil, nil).ServeLocal(ctx, listener) }()
	defer func() { cancel(); <-ended }()

	if out, code := entente(t, "gateway", "undrain", "--socket", socket); code != exitRefused || !strings.Contains(out, "it takes connections") {
		t.Errorf("undrain of a gateway that is not drained: exit code %d: %s", code, out)
	}
	out, code := entente(t, "gateway", "drain", "--reason", "kernel update", "--socket", socket)
	if code != exitOK || !strings.Contains(out, "gw-1 is drained (kernel update): 2 connections and 2 requests are left") ||
		!strings.Contains(out, "gw-1 is drained (kernel update): 0 connections and 0 requests are left") {
		t.Errorf("exit code %d: %s", code, out)
	}
	if out, _ := entente(t, "gateway", "status", "--socket", socket); !regexp.MustCompile(`(?m)^DRAINED +\d+s ago by local user .*: kernel update$`).MatchString(out) {
		t.Errorf("status of a drained gateway:\n%s", out)
	}
	if out, code := entente(t, "gateway", "drain", "--reason", strings.Repeat("x", 201), "--socket", socket); code != exitRefused {
		t.Errorf("a reason of 201 characters: exit code %d: %s", code, out)
	}
	if out, code := entente(t, "gateway", "undrain", "--socket", socket); code != exitOK || !strings.Contains(out, "gw-1 takes connections") {
		t.Errorf("exit code %d: %s", code, out)
	}

	g.mu.Lock()
	g.left = stuck
	g.mu.Unlock()
	if out, code := entente(t, "gateway", "drain", "--timeout", "300ms", "--socket", socket); code != exitFindings || !strings.Contains(out, "it stays drained") {
		t.Errorf("requests that do not end: exit code %d: %s", code, out)
	}
	raw, code := entente(t, "gateway", "drain", "--wait=false", "--json", "--socket", socket)
	var fields struct {
		Requests int
		Drained  struct{ Who string }
	}
	if err := json.Unmarshal([]byte(raw), &fields); code != exitOK || err != nil || fields.Requests != stuck || !strings.HasPrefix(fields.Drained.Who, "local user") {
		t.Errorf("exit code %d, %v: %s", code, err, raw)
	}
	time.AfterFunc(300*time.Millisecond, func() { g.Undrain() })
	if out, code := entente(t, "gateway", "drain", "--socket", socket); code != exitRefused || !strings.Contains(out, "somebody has undrained it") {
		t.Errorf("undrained meanwhile: exit code %d: %s", code, out)
	}
}
