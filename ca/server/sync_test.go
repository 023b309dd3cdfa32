package server_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/presence"
)

// syncStream is a raw subscriber and what it holds.
type syncStream struct {
	ententev1.Sync_SyncClient
	cancel    context.CancelFunc
	revision  uint64
	full      int
	entries   map[string]bool
	objects   map[string]*statev1.Object
	bundles   map[string]string
	instances map[string]*ententev1.Instance
	complete  bool
	beats     int
}

func openSync(t testing.TB, conn *grpc.ClientConn, boot string, connect, resume uint64) *syncStream {
	t.Helper()
	return openLevel(t, conn, boot, connect, resume, 0)
}

// openLevel is openSync of a subscriber of that level.
func openLevel(t testing.TB, conn *grpc.ClientConn, boot string, connect, resume uint64, level uint32) *syncStream {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := ententev1.NewSyncClient(conn).Sync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := &syncStream{Sync_SyncClient: stream, cancel: cancel,
		entries: map[string]bool{}, objects: map[string]*statev1.Object{}, bundles: map[string]string{}, instances: map[string]*ententev1.Instance{}}
	s.send(t, &ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: &ententev1.Hello{
		BootId: boot, Connect: connect, ResumeRevision: resume, Level: level,
	}}})
	return s
}

func (s *syncStream) send(t testing.TB, message *ententev1.SyncRequest) {
	t.Helper()
	if err := s.Send(message); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func (s *syncStream) report(t testing.TB, instances ...*ententev1.Instance) {
	t.Helper()
	s.send(t, &ententev1.SyncRequest{Message: &ententev1.SyncRequest_Report{Report: &ententev1.InstanceReport{Instances: instances}}})
}

// instanceKey is SERVICE@AGENT, with #ID where there is one.
func instanceKey(i *ententev1.Instance) string {
	key := i.GetService() + "@" + i.GetAgent()
	if i.GetId() != "" {
		key += "#" + i.GetId()
	}
	return key
}

func (s *syncStream) take(message *ententev1.SyncResponse) {
	if p := message.GetPolicy(); p != nil {
		if p.GetFull() {
			s.full++
			clear(s.entries)
			clear(s.objects)
			clear(s.bundles)
		}
		for _, e := range p.GetEntries() {
			s.entries[e.GetId()] = true
		}
		for _, id := range p.GetDeletedEntries() {
			delete(s.entries, id)
		}
		for _, b := range p.GetBundles() {
			s.bundles[b.GetTrustDomain()] = string(b.GetJwks())
		}
		for _, td := range p.GetDeletedBundles() {
			delete(s.bundles, td)
		}
		for _, o := range p.GetObjects() {
			s.objects[objectName(o)] = o
		}
		for _, key := range p.GetDeletedObjects() {
			delete(s.objects, key.GetKind()+"/"+key.GetName())
		}
		if p.GetLast() {
			s.revision = p.GetRevision()
		}
	}
	if p := message.GetPresence(); p != nil {
		for _, i := range p.GetInstances() {
			s.instances[instanceKey(i)] = i
		}
		for _, i := range p.GetWithdrawn() {
			delete(s.instances, instanceKey(i))
		}
		s.complete = s.complete || p.GetComplete()
	}
	if message.GetHeartbeat() != nil {
		s.beats++
	}
}

func objectName(o *statev1.Object) string {
	switch {
	case o.GetService() != nil:
		return "Service/" + o.GetService().GetName()
	case o.GetGateway() != nil:
		return "Gateway/" + o.GetGateway().GetName()
	case o.GetRelationship() != nil:
		return "Relationship/" + o.GetRelationship().GetTrustDomain()
	}
	return o.String()
}

// until receives until the condition holds.
func (s *syncStream) until(t testing.TB, what string, done func() bool) {
	t.Helper()
	timer := time.AfterFunc(10*time.Second, s.cancel)
	defer timer.Stop()
	for !done() {
		message, err := s.Recv()
		if err != nil {
			t.Fatalf("waiting for %s: %v (entries %v, instances %v)", what, err, s.entries, s.instances)
		}
		s.take(message)
	}
}

func (s *syncStream) untilEnd(t testing.TB) error {
	t.Helper()
	timer := time.AfterFunc(10*time.Second, s.cancel)
	defer timer.Stop()
	for {
		message, err := s.Recv()
		if err != nil {
			if !timer.Stop() {
				t.Fatal("the stream did not end within 10 s")
			}
			return err
		}
		s.take(message)
	}
}

func TestSyncFullDeltaResume(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	at := c.Apply(twoHosts)
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)
	s := openSync(t, conn, "boot", 1, 0)
	s.until(t, "the full state", func() bool { return s.revision >= at && s.complete })
	if s.full != 1 || len(s.entries) != 1 || !s.entries["service/accounts"] || len(s.objects) != 3 || s.bundles["banking.example"] == "" {
		t.Fatalf("full state: %+v", s)
	}

	begin := time.Now()
	at = c.Apply(strings.ReplaceAll(strings.SplitAfter(twoHosts, "---")[0], "accounts", "cards"))
	s.until(t, "the delta", func() bool { return s.revision >= at })
	if s.full != 1 || !s.entries["service/cards"] {
		t.Errorf("delta: %+v", s)
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("a new entry took %v", took)
	}

	// Cut off; something changes; resumed.
	s.cancel()
	at = c.Apply(strings.ReplaceAll(strings.SplitAfter(twoHosts, "---")[0], "accounts", "loans"))
	resumed := openSync(t, conn, "boot", 2, s.revision)
	resumed.until(t, "what was missed", func() bool { return resumed.revision >= at })
	if resumed.full != 0 || len(resumed.entries) != 1 || !resumed.entries["service/loans"] {
		t.Errorf("resumed: %+v", resumed)
	}
	resumed.until(t, "a heartbeat", func() bool { return resumed.beats > 0 })

	// One from the future, which this node has not seen.
	ahead := openSync(t, conn, "boot", 3, at+1000)
	wantCode(t, "ahead of the node", ahead.untilEnd(t), codes.Unavailable)
	// An older session.
	wantCode(t, "an older session", openSync(t, conn, "boot", 1, 0).untilEnd(t), codes.Aborted)
	// Not a Hello.
	stream, err := ententev1.NewSyncClient(conn).Sync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Ack{Ack: &ententev1.Ack{}}}); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, "no Hello", err, codes.InvalidArgument)
}

func TestLaterSessionEndsTheEarlier(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)
	first := openSync(t, conn, "boot", 1, 0)
	first.until(t, "the full state", func() bool { return first.revision > 0 })
	second := openSync(t, conn, "boot", 2, 0)
	second.until(t, "the full state", func() bool { return second.revision > 0 })
	wantCode(t, "the earlier session", first.untilEnd(t), codes.Aborted)
}

func TestInstanceReports(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	agent, other := attest(t, c, "h1"), attest(t, c, "h2")
	s := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	watcher := openSync(t, dial(t, c, &other), "boot", 1, 0)

	healthy := ententev1.Health_HEALTH_HEALTHY
	s.report(t,
		&ententev1.Instance{Service: "ledger", Address: "127.0.0.1:7443", Health: healthy},                                // on h2
		&ententev1.Instance{Service: "nothing", Address: "127.0.0.1:7443", Health: healthy},                               // nowhere
		&ententev1.Instance{Service: "accounts", Agent: "h2", Datacenter: "dc9", Address: "127.0.0.1:1", Health: healthy}, // fine, but not as h2 in dc9
	)
	watcher.until(t, "the instance", func() bool { return watcher.instances["accounts@h1"] != nil })
	if len(watcher.instances) != 1 {
		t.Errorf("instances: %v", watcher.instances)
	}
	if i := watcher.instances["accounts@h1"]; i.GetDatacenter() != "dc1" || i.GetBootId() != "boot" || i.GetHealth() != healthy || i.GetStale() {
		t.Errorf("the instance: %v", i)
	}
	if text := metricsOf(t, c); !strings.Contains(text, "\nentente_ca_reported_instances_left_out_total 2\n") {
		t.Error("the two that were left out are not counted")
	}
	// At an address that is not the host's: what was there goes, for the report is the whole.
	s.report(t, &ententev1.Instance{Service: "accounts", Address: "10.0.0.1:7443", Health: healthy})
	watcher.until(t, "its withdrawal", func() bool { return len(watcher.instances) == 0 })

	s.report(t, &ententev1.Instance{Service: "accounts", Address: "127.0.0.1:2", Health: healthy})
	watcher.until(t, "the instance", func() bool { return len(watcher.instances) == 1 })
	// The stream breaks: stale. Goodbye: gone.
	s.cancel()
	watcher.until(t, "the stale mark", func() bool { return watcher.instances["accounts@h1"].GetStale() })
	s = openSync(t, dial(t, c, &agent), "boot", 2, 0)
	watcher.until(t, "the reconnect", func() bool { return !watcher.instances["accounts@h1"].GetStale() })
	s.report(t, &ententev1.Instance{Service: "accounts", Address: "127.0.0.1:2", Health: healthy})
	s.CloseSend()
	watcher.until(t, "the goodbye", func() bool { return len(watcher.instances) == 0 })
}

// An agent names several instances of one service, within bounds; nobody else's.
func TestInstancesHaveIDs(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	two := c.Join("ca-2", "dc2")
	agent, other := attest(t, c, "h1"), attest(t, two, "h2") // which each of them knows at once then
	s := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	watcher := openLevel(t, dial(t, two, &other), "boot", 1, 0, ca.SyncLevel) // at another CA node
	of := func(service, id string) *ententev1.Instance {
		return &ententev1.Instance{Service: service, Id: id, Address: "127.0.0.1:7443", Health: ententev1.Health_HEALTH_HEALTHY}
	}
	many := []*ententev1.Instance{of("ledger", "a"), of("accounts", "A/b"), of("accounts", strings.Repeat("x", 64))} // another's; no labels
	for i := range presence.MaxInstancesOfService + 3 {
		many = append(many, of("accounts", fmt.Sprint("i", i)))
	}
	s.report(t, many...)
	watcher.until(t, "the instances", func() bool { return len(watcher.instances) == presence.MaxInstancesOfService })
	for key := range watcher.instances {
		if !strings.HasPrefix(key, "accounts@h1#i") {
			t.Errorf("%s was heard of", key)
		}
	}
	s.report(t, of("accounts", "i1"), of("accounts", "")) // control: one of them stays, and one without an id
	watcher.until(t, "the two", func() bool {
		return len(watcher.instances) == 2 && watcher.instances["accounts@h1#i1"] != nil && watcher.instances["accounts@h1"] != nil
	})
}

// A gateway listens, and says nothing of instances.
func TestGatewaySubscribes(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	host := attest(t, c, "h2")
	gateway, err := sign(t, dial(t, c, &host), "gateway/gw-1", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	s := openSync(t, dial(t, c, &gateway), "boot", 1, 0)
	s.report(t, &ententev1.Instance{Service: "ledger", Address: "127.0.0.1:7443", Health: ententev1.Health_HEALTH_HEALTHY})
	s.until(t, "the full state", func() bool { return s.revision > 0 && s.complete })
	if len(s.entries) != 1 || !s.entries["gateway/gw-1"] {
		t.Errorf("entries %v", s.entries)
	}
	s.until(t, "a heartbeat", func() bool { return s.beats > 0 })
	if len(s.instances) != 0 {
		t.Errorf("a gateway announced %v", s.instances)
	}
	// Its entry goes; so does the stream (I4).
	_, err = c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Gateway", Name: "gw-1"}}})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.untilEnd(t)
	if took := time.Since(begin); took > time.Second {
		t.Errorf("a deleted gateway's stream lasted %v", took)
	}
}

// Gateways and edges follow Sync by themselves. Any other workload does not learn the
// catalogue so, whatever it is declared as, and an edge that ends to be one neither.
func TestOnlyGatewaysAndEdgesSync(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts + edges + `
---
apiVersion: entente/v1
kind: Service
metadata: {name: caller}
spec: {run: {uid: 1005, hosts: [h2]}, outbound: {port: 19001}}
`)
	if err := changeOne(t, c.Admin(), change("job", "/job", "h2", 1006)); err != nil {
		t.Fatal(err)
	}
	host := attest(t, c, "h2")
	conn := dial(t, c, &host)
	open := func(entry string) *syncStream {
		t.Helper()
		cert, err := sign(t, conn, entry, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		return openSync(t, dial(t, c, &cert), entry, 1, 0)
	}
	for _, entry := range []string{"service/ledger", "service/caller", "service/old-edge", "entry/job"} {
		s := open(entry)
		wantCode(t, entry, s.untilEnd(t), codes.PermissionDenied)
		if s.revision != 0 || len(s.objects) != 0 {
			t.Errorf("%s was told of %v", entry, s.objects)
		}
	}
	edge := open("service/edge")
	for entry, s := range map[string]*syncStream{"gateway/gw-1": open("gateway/gw-1"), "service/edge": edge} {
		s.until(t, "the full state of "+entry, func() bool { return s.revision > 0 && s.complete && s.objects["Service/ledger"] != nil })
	}
	c.Apply(`
apiVersion: entente/v1
kind: Service
metadata: {name: edge}
spec: {run: {uid: 1003, hosts: [h2]}, port: 8090}
`)
	wantCode(t, "an edge that is a service now", edge.untilEnd(t), codes.PermissionDenied)
}

// A workload has a seat of its own: whatever it opens, its host's agent and the gateway
// beside it keep their streams.
func TestWorkloadTakesNobodysSeat(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	host := attest(t, v.CA, "h2")
	conn := dial(t, v.CA, &host)
	holds := func(entry string) tls.Certificate {
		cert, err := sign(t, conn, entry, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	gateway, greedy := holds("gateway/gw-1"), holds("service/ledger")
	streams := map[string]*syncStream{"the agent": openSync(t, conn, "agent", 1, 0), "the gateway": openSync(t, dial(t, v.CA, &gateway), "gw", 1, 0)}
	for name, s := range streams {
		s.until(t, name, func() bool { return s.complete })
	}
	for range 60 {
		raw := v.raw(&greedy)
		io.WriteString(raw, http2.ClientPreface)
		http2.NewFramer(raw, raw).WriteSettings()
	}
	if n := v.metric(`entente_ca_connections_cut_total{kind="peer"}`); n < 20 {
		t.Errorf("%v connections of the workload were cut: it has more than its seat", n)
	}
	for name, s := range streams {
		beats := s.beats
		s.until(t, name+" hears on", func() bool { return s.beats > beats })
	}
	more := openSync(t, dial(t, v.CA, &gateway), "gw", 2, 0)
	more.until(t, "the gateway comes again", func() bool { return more.complete })
}

// I6, over the wire and between two real domains.
func TestForeignBundleReachesOnlyTheGatewaysHost(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	plain, host := attest(t, c, "h1"), attest(t, c, "h2")
	workload, gateway := openSync(t, dial(t, c, &plain), "boot", 1, 0), openSync(t, dial(t, c, &host), "boot", 1, 0)
	c.Relate(trading)
	gateway.until(t, "the foreign bundle", func() bool { return gateway.bundles["trading.example"] != "" })
	at := c.Status().GetRevision()
	at = max(at, gateway.revision)
	workload.until(t, "the same revision", func() bool { return workload.revision >= at })
	if len(workload.bundles) != 1 {
		t.Errorf("an agent without a gateway holds %d bundles", len(workload.bundles))
	}
	roots := trading.Bundle().X509Authorities()
	for name, s := range map[string]*syncStream{"agent": workload, "gateway's agent": gateway} {
		r := s.objects["Relationship/trading.example"].GetRelationship()
		if r == nil || len(r.GetBootstrapBundle()) != 0 {
			t.Errorf("the %s's relationship: %v", name, r)
		}
	}
	if len(roots) == 0 || !strings.Contains(gateway.bundles["trading.example"], "x5c") {
		t.Error("control: the gateway's host holds no foreign root")
	}

	_, err := c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Relationship", Name: "trading.example"}}})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	gateway.until(t, "the end of the relationship", func() bool { return gateway.bundles["trading.example"] == "" })
	if took := time.Since(begin); took > time.Second {
		t.Errorf("the end of a relationship took %v (I4)", took)
	}
}

// A subscriber that does not read holds nobody up, and catches up when it does.
func TestSlowConsumer(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	agent := attest(t, c, "h1")
	slow := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	slow.until(t, "the full state", func() bool { return slow.revision > 0 })

	var at uint64
	for i := range 30 {
		objects := make([]*statev1.Object, 0, 20)
		for j := range 20 {
			objects = append(objects, &statev1.Object{Owner: strings.Repeat("x", 900), Kind: &statev1.Object_Service{Service: &statev1.Service{
				Name: fmt.Sprint("s", j), Path: fmt.Sprint("/s", j), Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}, Port: uint32(i + 1),
			}}})
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		resp, err := c.Admin().Apply(ctx, &ententev1.ApplyRequest{Objects: objects})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		at = resp.GetRevision()
	}
	slow.until(t, "all changes", func() bool { return slow.revision >= at })
	ports := map[uint32]bool{}
	for _, o := range slow.objects {
		ports[o.GetService().GetPort()] = true
	}
	if len(slow.objects) != 20 || len(ports) != 1 || !ports[30] {
		t.Errorf("%d objects with ports %v", len(slow.objects), ports)
	}
}

// A node that stops tells its subscribers to go elsewhere, at once.
func TestShutdownEndsStreams(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	agent := attest(t, c, "h1")
	s := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	s.until(t, "the full state", func() bool { return s.revision > 0 })
	begin := time.Now()
	c.Stop()
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if code := status.Code(s.untilEnd(t)); !slices.Contains([]codes.Code{codes.Unavailable}, code) {
		t.Errorf("the stream ended with %s", code)
	}
}

// I14: an agent that reports without end is told of a few times to the others, and they
// hear at once of what keeps requests away, of its instances as of another agent's.
func TestHealthFlipsReachNobody(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	h1, h2 := attest(t, c, "h1", "127.0.0.1"), attest(t, c, "h2")
	gateway, err := sign(t, dial(t, c, &h2), "gateway/gw-1", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	agent, victim := openSync(t, dial(t, c, &h1), "a", 1, 0), openSync(t, dial(t, c, &gateway), "g", 1, 0)
	agent.until(t, "picture", func() bool { return agent.complete })
	victim.until(t, "picture", func() bool { return victim.complete })
	drain := make(chan struct{})
	go func() {
		defer close(drain)
		for {
			if _, err := agent.Recv(); err != nil {
				return
			}
		}
	}()
	told := make(chan ententev1.Health, 100_000)
	go func() {
		for {
			m, err := victim.Recv()
			if err != nil {
				return
			}
			for _, i := range m.GetPresence().GetInstances() {
				told <- i.GetHealth()
			}
		}
	}()
	say := func(health ententev1.Health) {
		agent.report(t, &ententev1.Instance{Service: "accounts", Address: "127.0.0.1:8080", Health: health})
	}
	hear := func(health ententev1.Health) {
		t.Helper()
		timeout := time.After(5 * time.Second)
		for {
			select {
			case got := <-told:
				if got == health {
					return
				}
			case <-timeout:
				t.Fatalf("%v was not told", health)
			}
		}
	}
	say(ententev1.Health_HEALTH_HEALTHY) // control
	hear(ententev1.Health_HEALTH_HEALTHY)
	say(ententev1.Health_HEALTH_UNHEALTHY)
	hear(ententev1.Health_HEALTH_UNHEALTHY)

	sent := 0
	for until := time.Now().Add(2 * time.Second); time.Now().Before(until); sent += 2 {
		say(ententev1.Health_HEALTH_HEALTHY)
		say(ententev1.Health_HEALTH_UNHEALTHY)
	}
	time.Sleep(500 * time.Millisecond)
	if n := len(told); sent < 1000 || n > 30 {
		t.Errorf("of %d reports %d were told", sent, n)
	}
}
