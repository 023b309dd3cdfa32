package sds

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/workloadapi"
)

const (
	ownID     = "spiffe://banking.example/accounts"
	ownBundle = "spiffe://banking.example"
)

func serviceYAML(name, spec string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + ", owner: team}\nspec: {" + spec + "}\n---\n"
}

func mine(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("run: {uid: %d, path: %s, hosts: [h1]}", os.Getuid(), exe)
}

// client is Envoy's side of the protocol, made of Envoy's own types.
type client struct {
	t *testing.T
	secret.SecretDiscoveryServiceClient
	agent *meshagent.Agent
}

func start(t *testing.T, c *catest.CA, lines ...string) *client {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\nsettle: 20ms\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\n%s\n",
		filepath.Join(dir, "data"), c.AgentToken("h1", "dc1"), filepath.Join(dir, "agent.sock"), strings.Join(lines, "\n"))))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := workloadapi.Listen(cfg.WorkloadAPI.Socket)
	if err != nil {
		t.Fatal(err)
	}
	api := workloadapi.New(agent, listener, nil)
	api.Beside(New(agent, cfg.SDS, workloadapi.Caller, nil).Register)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, meshagent.Door{Name: "workload API", Run: api.Run}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+cfg.WorkloadAPI.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	eventually(t, agent.Ready)
	return &client{t, secret.NewSecretDiscoveryServiceClient(conn), agent}
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func (c *client) context() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	c.t.Cleanup(cancel)
	return ctx
}

// stream is one state-of-the-world stream; what comes is collected.
type stream struct {
	t *testing.T
	secret.SecretDiscoveryService_StreamSecretsClient
	got  chan *discovery.DiscoveryResponse
	fail chan error
}

func (c *client) stream() *stream {
	c.t.Helper()
	s, err := c.StreamSecrets(c.context())
	if err != nil {
		c.t.Fatal(err)
	}
	st := &stream{c.t, s, make(chan *discovery.DiscoveryResponse, 16), make(chan error, 1)}
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				st.fail <- err
				return
			}
			st.got <- r
		}
	}()
	return st
}

func (s *stream) ask(version, nonce string, fault error, names ...string) {
	s.t.Helper()
	q := &discovery.DiscoveryRequest{VersionInfo: version, ResponseNonce: nonce, ResourceNames: names, TypeUrl: typeURL}
	if fault != nil {
		q.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: fault.Error()}
	}
	if err := s.Send(q); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stream) next() *discovery.DiscoveryResponse {
	s.t.Helper()
	select {
	case r := <-s.got:
		return r
	case err := <-s.fail:
		s.t.Fatal(err)
	case <-time.After(15 * time.Second):
		s.t.Fatal("nothing came")
	}
	return nil
}

// quiet is long enough for an answer that must not come.
const quiet = 150 * time.Millisecond

func (s *stream) silent() {
	s.t.Helper()
	select {
	case r := <-s.got:
		s.t.Fatalf("unasked: %v", names(r.GetResources()))
	case err := <-s.fail:
		s.t.Fatal(err)
	case <-time.After(quiet):
	}
}

func (s *stream) failure() codes.Code {
	s.t.Helper()
	select {
	case err := <-s.fail:
		return status.Code(err)
	case r := <-s.got:
		s.t.Fatalf("got %v", names(r.GetResources()))
	case <-time.After(15 * time.Second):
		s.t.Fatal("it did not end")
	}
	return codes.OK
}

func unpack(t *testing.T, packed *anypb.Any) *tlsv3.Secret {
	t.Helper()
	s := &tlsv3.Secret{}
	if err := packed.UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	if err := s.ValidateAll(); err != nil { // Envoy's own rules
		t.Error(err)
	}
	return s
}

func names(resources []*anypb.Any) (list []string) {
	for _, r := range resources {
		s := &tlsv3.Secret{}
		if r.UnmarshalTo(s) == nil {
			list = append(list, s.GetName())
		}
	}
	return list
}

// keyPair reads a certificate as Envoy would, and gives its SPIFFE ID.
func keyPair(t *testing.T, s *tlsv3.Secret) string {
	t.Helper()
	c := s.GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf.URIs[0].String()
}

// trusted reads the SPIFFE validator's configuration: trust domain -> bundle.
func trusted(t *testing.T, s *tlsv3.Secret) map[string]*x509bundle.Bundle {
	t.Helper()
	config := s.GetValidationContext().GetCustomValidatorConfig()
	if config.GetName() != "envoy.tls.cert_validator.spiffe" || s.GetValidationContext().GetTrustedCa() != nil {
		t.Fatalf("validation context: %v", s.GetValidationContext())
	}
	spiffe := &tlsv3.SPIFFECertValidatorConfig{}
	if err := config.GetTypedConfig().UnmarshalTo(spiffe); err != nil {
		t.Fatal(err)
	}
	if err := spiffe.ValidateAll(); err != nil {
		t.Error(err)
	}
	got := map[string]*x509bundle.Bundle{}
	for _, d := range spiffe.GetTrustDomains() {
		b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(d.GetName()), d.GetTrustBundle().GetInlineBytes())
		if err != nil {
			t.Fatal(err)
		}
		if got[d.GetName()] != nil {
			t.Errorf("two entries for %s", d.GetName())
		}
		got[d.GetName()] = b
	}
	return got
}

// FetchSecrets: every name, and what is refused.
func TestNames(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", mine(t)) + serviceYAML("ledger", "run: {uid: 4711, hosts: [h1]}"))
	envoy := start(t, c)
	for _, test := range []struct {
		names []string
		want  []string
	}{
		{nil, []string{ownBundle, ownID}},
		{[]string{"*"}, []string{ownBundle, ownID}},
		{[]string{"default"}, []string{"default"}},
		{[]string{"ROOTCA", "default", "ALL"}, []string{"ALL", "ROOTCA", "default"}},
		{[]string{ownID, ownBundle, ownID}, []string{ownBundle, ownID}},
	} {
		r, err := envoy.FetchSecrets(envoy.context(), &discovery.DiscoveryRequest{ResourceNames: test.names})
		if err != nil {
			t.Fatalf("%v: %v", test.names, err)
		}
		if got := names(r.GetResources()); !slices.Equal(got, test.want) {
			t.Errorf("%v: got %v", test.names, got)
		}
		for _, packed := range r.GetResources() {
			switch s := unpack(t, packed); s.GetName() {
			case "default", ownID:
				if id := keyPair(t, s); id != ownID {
					t.Errorf("%s is of %s", s.GetName(), id)
				}
			default:
				if got := trusted(t, s); len(got) != 1 || !got["banking.example"].Equal(c.Bundle()) {
					t.Errorf("%s: %v", s.GetName(), got)
				}
			}
		}
	}
	for _, test := range []struct {
		request *discovery.DiscoveryRequest
		want    codes.Code
	}{
		{&discovery.DiscoveryRequest{ResourceNames: []string{"spiffe://banking.example/ledger"}}, codes.PermissionDenied}, // another's
		{&discovery.DiscoveryRequest{ResourceNames: []string{"default", "spiffe://trading.example"}}, codes.PermissionDenied},
		{&discovery.DiscoveryRequest{ResourceNames: []string{"default", "\xe2\x98\xa0"}}, codes.PermissionDenied},
		{&discovery.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, codes.InvalidArgument},
		{&discovery.DiscoveryRequest{ResourceNames: make([]string, maxNames+1)}, codes.ResourceExhausted},
	} {
		if r, err := envoy.FetchSecrets(envoy.context(), test.request); status.Code(err) != test.want {
			t.Errorf("%.3v: %v %v", test.request.GetResourceNames(), names(r.GetResources()), err)
		}
	}
}

// The names can be others, as with a SPIRE agent; those that they replace mean nothing
// then. Without the validator bundles are plain lists, and those of all domains are refused.
func TestConfiguredNames(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", mine(t)))
	envoy := start(t, c, "sds: {defaultSVIDName: my-svid, defaultBundleName: my-ca, defaultAllBundlesName: my-cas, disableSPIFFECertValidation: true}")
	r, err := envoy.FetchSecrets(envoy.context(), &discovery.DiscoveryRequest{ResourceNames: []string{"my-svid", "my-ca"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := names(r.GetResources()); !slices.Equal(got, []string{"my-ca", "my-svid"}) {
		t.Fatalf("got %v", got)
	}
	if id := keyPair(t, unpack(t, r.GetResources()[1])); id != ownID {
		t.Errorf("my-svid is of %s", id)
	}
	bundle := unpack(t, r.GetResources()[0]).GetValidationContext()
	if bundle.GetCustomValidatorConfig() != nil || len(bundle.GetTrustedCa().GetInlineBytes()) == 0 {
		t.Errorf("%v", bundle)
	}
	for name, want := range map[string]codes.Code{
		"default": codes.PermissionDenied, "ROOTCA": codes.PermissionDenied, "ALL": codes.PermissionDenied, "my-cas": codes.InvalidArgument, ownID: codes.OK,
	} {
		if _, err := envoy.FetchSecrets(envoy.context(), &discovery.DiscoveryRequest{ResourceNames: []string{name}}); status.Code(err) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Who has no identity gets nothing, on any call.
func TestDenied(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("ledger", "run: {uid: 4711, hosts: [h1]}"))
	envoy := start(t, c)
	if _, err := envoy.FetchSecrets(envoy.context(), &discovery.DiscoveryRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("fetch: %v", err)
	}
	s := envoy.stream()
	s.ask("", "", nil, "default")
	if got := s.failure(); got != codes.PermissionDenied {
		t.Errorf("stream: %v", got)
	}
	d := envoy.delta()
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})
	if got := d.failure(); got != codes.PermissionDenied {
		t.Errorf("delta: %v", got)
	}
}

// Bundles of other domains come only to an entry that federates with them, each as
// an entry of its own, and a node without Envoy's validator cannot pool them.
// Requirements: 45, 121, 126.
func TestFederated(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	other := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	c.Relate(other)
	c.Apply("apiVersion: entente/v1\nkind: Gateway\nmetadata: {name: gw, owner: net}\nspec: {" + mine(t) + ", datacenter: dc1, address: \"127.0.0.1:7443\"}\n")
	envoy := start(t, c)
	fetch := func(q *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
		return envoy.FetchSecrets(envoy.context(), q)
	}
	eventually(t, func() error {
		_, err := fetch(&discovery.DiscoveryRequest{ResourceNames: []string{"spiffe://trading.example"}})
		return err
	})
	r, err := fetch(&discovery.DiscoveryRequest{ResourceNames: []string{"ALL", "ROOTCA"}})
	if err != nil {
		t.Fatal(err)
	}
	all := trusted(t, unpack(t, r.GetResources()[0]))
	if len(all) != 2 || !all["banking.example"].Equal(c.Bundle()) || !all["trading.example"].Equal(other.Bundle()) {
		t.Errorf("ALL: %v", all)
	}
	if own := trusted(t, unpack(t, r.GetResources()[1])); len(own) != 1 || own["banking.example"] == nil {
		t.Errorf("ROOTCA: %v", own)
	}
	metadata := func(v any) *core.Node {
		fields, err := structpb.NewStruct(map[string]any{plainKey: v})
		if err != nil {
			t.Fatal(err)
		}
		return &core.Node{Metadata: fields}
	}
	for _, on := range []any{true, "true"} {
		r, err = fetch(&discovery.DiscoveryRequest{Node: metadata(on), ResourceNames: []string{"ROOTCA"}})
		if err != nil {
			t.Fatal(err)
		}
		ctx := unpack(t, r.GetResources()[0]).GetValidationContext()
		plain, err := x509bundle.Parse(c.TrustDomain(), ctx.GetTrustedCa().GetInlineBytes())
		if err != nil || !plain.Equal(c.Bundle()) || ctx.GetCustomValidatorConfig() != nil {
			t.Errorf("plain: %v %v", ctx, err)
		}
		if _, err = fetch(&discovery.DiscoveryRequest{Node: metadata(on), ResourceNames: []string{"ALL"}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ALL as one plain list: %v", err)
		}
	}
	if r, err = fetch(&discovery.DiscoveryRequest{Node: metadata(false), ResourceNames: []string{"ALL"}}); err != nil || len(trusted(t, unpack(t, r.GetResources()[0]))) != 2 {
		t.Errorf("control: %v", err)
	}
}

// The state-of-the-world stream: every way a client can answer.
func TestStream(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	spec := mine(t)
	c.Apply(serviceYAML("accounts", spec))
	envoy := start(t, c)
	reissue := func(ttl string) { c.Apply(serviceYAML("accounts", spec+", ttl: {x509: "+ttl+"}")) }

	s := envoy.stream()
	s.ask("", "", nil, "default")
	first := s.next()
	if first.GetTypeUrl() != typeURL || first.GetNonce() == "" || first.GetVersionInfo() == "" {
		t.Fatalf("%v %q %q", first.GetTypeUrl(), first.GetNonce(), first.GetVersionInfo())
	}
	s.ask(first.GetVersionInfo(), first.GetNonce(), nil, "default") // ACK
	s.silent()

	reissue("1h")
	second := s.next()
	if second.GetVersionInfo() == first.GetVersionInfo() || second.GetNonce() == first.GetNonce() || keyPair(t, unpack(t, second.GetResources()[0])) != ownID {
		t.Errorf("a new SVID: %q %q", second.GetVersionInfo(), second.GetNonce())
	}
	s.ask(first.GetVersionInfo(), first.GetNonce(), nil, "default", "ROOTCA") // stale: of the one before
	s.silent()
	s.ask(first.GetVersionInfo(), second.GetNonce(), fmt.Errorf("key does not match"), "default") // NACK
	s.silent()
	reissue("2h")
	third := s.next() // what follows a NACK is the next news
	if third.GetVersionInfo() == second.GetVersionInfo() {
		t.Error("the refused version came again")
	}
	s.ask(third.GetVersionInfo(), third.GetNonce(), nil, "default", "ROOTCA") // ACK, and more names
	fourth := s.next()
	if got := names(fourth.GetResources()); !slices.Equal(got, []string{"ROOTCA", "default"}) {
		t.Errorf("more names: %v", got)
	}
	s.ask(third.GetVersionInfo(), fourth.GetNonce(), fmt.Errorf("no"), "default") // NACK, and fewer names
	fifth := s.next()
	if got := names(fifth.GetResources()); !slices.Equal(got, []string{"default"}) || fifth.GetVersionInfo() != third.GetVersionInfo() {
		t.Errorf("fewer names: %v %q", got, fifth.GetVersionInfo())
	}
	s.ask(fifth.GetVersionInfo(), fifth.GetNonce(), nil) // it gives up its last name: that is not everything
	s.silent()
	reissue("3h")
	s.silent()

	// Another stream of the same client begins with what it had: it is answered, and
	// the version is that of the content.
	again := envoy.stream()
	again.ask(fifth.GetVersionInfo(), "17", nil, "ROOTCA")
	bundle := again.next()
	once := envoy.stream()
	once.ask(bundle.GetVersionInfo(), "", nil, "ROOTCA")
	if same := once.next(); same.GetVersionInfo() != bundle.GetVersionInfo() || !proto.Equal(same.GetResources()[0], bundle.GetResources()[0]) {
		t.Error("the same content has another version")
	}
	// The entitlement ends, and with it the stream.
	c.Apply(serviceYAML("accounts", "run: {uid: 4711, hosts: [h1]}"))
	if got := again.failure(); got != codes.PermissionDenied {
		t.Errorf("entitlement gone: %v", got)
	}
}

// deltas is one incremental stream.
type deltas struct {
	t *testing.T
	secret.SecretDiscoveryService_DeltaSecretsClient
	got  chan *discovery.DeltaDiscoveryResponse
	fail chan error
}

func (c *client) delta() *deltas {
	c.t.Helper()
	s, err := c.DeltaSecrets(c.context())
	if err != nil {
		c.t.Fatal(err)
	}
	d := &deltas{c.t, s, make(chan *discovery.DeltaDiscoveryResponse, 16), make(chan error, 1)}
	go func() {
		for {
			r, err := s.Recv()
			if err != nil {
				d.fail <- err
				return
			}
			d.got <- r
		}
	}()
	return d
}

func (d *deltas) ask(q *discovery.DeltaDiscoveryRequest) {
	d.t.Helper()
	if err := d.Send(q); err != nil {
		d.t.Fatal(err)
	}
}

func (d *deltas) ack(r *discovery.DeltaDiscoveryResponse, fault string) {
	d.t.Helper()
	q := &discovery.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce()}
	if fault != "" {
		q.ErrorDetail = &rpcstatus.Status{Message: fault}
	}
	d.ask(q)
}

// next is the next response as text: names that came, and "-" with names that went.
func (d *deltas) next() (*discovery.DeltaDiscoveryResponse, string) {
	d.t.Helper()
	select {
	case r := <-d.got:
		var words []string
		for _, resource := range r.GetResources() {
			if s := unpack(d.t, resource.GetResource()); s.GetName() != resource.GetName() || resource.GetVersion() == "" {
				d.t.Errorf("%s %q holds %s", resource.GetName(), resource.GetVersion(), s.GetName())
			}
			words = append(words, resource.GetName())
		}
		for _, name := range r.GetRemovedResources() {
			words = append(words, "-"+name)
		}
		return r, strings.Join(words, " ")
	case err := <-d.fail:
		d.t.Fatal(err)
	case <-time.After(15 * time.Second):
		d.t.Fatal("nothing came")
	}
	return nil, ""
}

func (d *deltas) silent() {
	d.t.Helper()
	select {
	case r := <-d.got:
		d.t.Fatalf("unasked: %d, removed %v", len(r.GetResources()), r.GetRemovedResources())
	case err := <-d.fail:
		d.t.Fatal(err)
	case <-time.After(quiet):
	}
}

func (d *deltas) failure() codes.Code {
	d.t.Helper()
	select {
	case err := <-d.fail:
		return status.Code(err)
	case <-time.After(15 * time.Second):
		d.t.Fatal("it did not end")
	}
	return codes.OK
}

func TestDelta(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	spec := mine(t)
	c.Apply(serviceYAML("accounts", spec))
	envoy := start(t, c)

	d := envoy.delta()
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA", "spiffe://banking.example/ledger"}})
	first, text := d.next()
	if text != "ROOTCA default -spiffe://banking.example/ledger" {
		t.Fatalf("first: %s", text)
	}
	d.ack(first, "")
	d.silent()

	// Only what is new comes, also what was not there before.
	c.Apply(serviceYAML("ledger", spec))
	r, text := d.next()
	if text != "spiffe://banking.example/ledger" || r.GetNonce() == first.GetNonce() {
		t.Errorf("a new identity: %s", text)
	}
	d.ack(r, "cannot parse") // NACK: not again until there is news
	d.silent()
	c.Apply(serviceYAML("ledger", spec+", ttl: {x509: 1h}"))
	if r, text = d.next(); text != "spiffe://banking.example/ledger" {
		t.Errorf("after a NACK: %s", text)
	}
	d.ack(r, "")
	d.ack(r, "of a nonce that is answered already")
	d.ack(&discovery.DeltaDiscoveryResponse{Nonce: "4711"}, "of a nonce that never was")
	d.silent()

	// Subscribing again sends again; unsubscribing ends it.
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default"}})
	if _, text = d.next(); text != "default" {
		t.Errorf("again: %s", text)
	}
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"spiffe://banking.example/ledger"}})
	c.Apply(serviceYAML("ledger", spec+", ttl: {x509: 2h}"))
	d.silent()

	// An identity that ends is removed, and the others stay.
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"spiffe://banking.example/ledger"}})
	if _, text = d.next(); text != "spiffe://banking.example/ledger" {
		t.Errorf("subscribed: %s", text)
	}
	c.Apply(serviceYAML("ledger", "run: {uid: 4711, hosts: [h1]}"))
	if _, text = d.next(); text != "-spiffe://banking.example/ledger" {
		t.Errorf("an identity gone: %s", text)
	}

	// A stream that resumes says what it holds and gets the rest.
	versions := map[string]string{}
	for _, resource := range first.GetResources() {
		versions[resource.GetName()] = resource.GetVersion()
	}
	resumed := envoy.delta()
	resumed.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA", "ALL"}, InitialResourceVersions: map[string]string{"ROOTCA": versions["ROOTCA"]}})
	if _, text = resumed.next(); text != "ALL" {
		t.Errorf("resumed: %s", text)
	}

	everything := envoy.delta()
	everything.ask(&discovery.DeltaDiscoveryRequest{})
	if _, text = everything.next(); text != ownBundle+" "+ownID {
		t.Errorf("everything: %s", text)
	}
	c.Apply(serviceYAML("accounts", "run: {uid: 4711, hosts: [h1]}"))
	for _, s := range []*deltas{d, resumed, everything} {
		if got := s.failure(); got != codes.PermissionDenied {
			t.Errorf("no entitlement is left: %v", got)
		}
	}
}

// A stream that asks for too much ends; the limits are per stream.
func TestLimits(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", mine(t)))
	envoy := start(t, c)
	var many []string
	for i := range maxNames + 1 {
		many = append(many, fmt.Sprintf("spiffe://banking.example/%d", i))
	}
	s := envoy.stream()
	s.ask("", "", nil, many...)
	if got := s.failure(); got != codes.ResourceExhausted {
		t.Errorf("stream: %v", got)
	}
	d := envoy.delta()
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: many[:maxNames]})
	if _, text := d.next(); strings.Count(text, "-") != maxNames {
		t.Error("control: not all names were answered")
	}
	d.ask(&discovery.DeltaDiscoveryRequest{ResourceNamesSubscribe: many[maxNames:]})
	if got := d.failure(); got != codes.ResourceExhausted {
		t.Errorf("delta: %v", got)
	}
	bad := envoy.delta()
	bad.ask(&discovery.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/google.protobuf.Empty"})
	if got := bad.failure(); got != codes.InvalidArgument {
		t.Errorf("type: %v", got)
	}
}

// I3: the CA goes on to use an authority only when an Envoy has said that it took the
// bundle with it. A refusal, or silence, holds it, and the CA's list says whose.
func TestAcknowledgedByEnvoy(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", mine(t)))
	client := start(t, c)
	st := client.stream()
	st.ask("", "", nil, "ROOTCA")
	first := st.next()
	prepared := func() *ententev1.AuthorityStatus {
		r, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range r.GetAuthorities() {
			if a.GetAuthority().GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && a.GetAuthority().GetUse() == statev1.KeyUse_KEY_USE_X509 {
				return a
			}
		}
		return nil
	}
	st.ask(first.GetVersionInfo(), first.GetNonce(), nil, "ROOTCA")
	last := first.GetVersionInfo()
	ready := func() error {
		if a := prepared(); a == nil || !a.GetAuthority().GetReady() {
			return fmt.Errorf("%v", a)
		}
		return nil
	}
	// newer takes what comes while the CA settles.
	newer := func(fault error) {
		for {
			select {
			case r := <-st.got:
				if last = r.GetVersionInfo(); fault == nil {
					st.ask(last, r.GetNonce(), nil, "ROOTCA")
				} else {
					st.ask("", r.GetNonce(), fault, "ROOTCA")
				}
			case <-time.After(quiet):
				return
			}
		}
	}
	eventually(t, func() error { newer(nil); return ready() }) // control

	next := prepared().GetAuthority().GetId()
	if _, err := c.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next}); err != nil {
		t.Fatal(err)
	}
	waits := func() error {
		if text := strings.Join(prepared().GetWaitingFor(), " "); !strings.Contains(text, "agent h1 (SDS, pid ") {
			return fmt.Errorf("waits for %q", text)
		}
		return nil
	}
	// Another authority was made; the Envoy says nothing.
	r := st.next()
	eventually(t, waits)
	time.Sleep(10 * quiet)
	if ready() == nil {
		t.Fatal("ready although an Envoy was silent")
	}
	st.ask("", r.GetNonce(), errors.New("no such validator"), "ROOTCA")
	newer(errors.New("no such validator"))
	if waits() != nil || ready() == nil {
		t.Fatalf("ready although an Envoy refused it: %v", prepared())
	}
	// It takes the next bundle.
	if _, err := c.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: prepared().GetAuthority().GetId(), Now: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { newer(nil); return ready() })
}
