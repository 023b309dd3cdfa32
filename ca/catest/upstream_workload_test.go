package catest_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	envoytls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/files"
	"github.com/entente-mesh/entente/meshagent/sds"
	workloaddoor "github.com/entente-mesh/entente/meshagent/workloadapi"
)

// certificates reads a PEM file that holds nothing else.
func certificates(t *testing.T, text []byte) (list []*x509.Certificate) {
	t.Helper()
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, cert)
	}
	return list
}

// underRoot says what is wrong with a chain that is to be verified by the root alone, as
// software does that knows nothing of SPIFFE.
func underRoot(chain []*x509.Certificate, root *x509.Certificate) error {
	if len(chain) != 2 || !chain[1].IsCA {
		return fmt.Errorf("%d certificates, not leaf and intermediate", len(chain))
	}
	options := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	options.Roots.AddCert(root)
	if _, err := chain[0].Verify(options); err == nil {
		return errors.New("control: the leaf verifies without its intermediate")
	}
	options.Intermediates.AddCert(chain[1])
	_, err := chain[0].Verify(options)
	if chain[0].NotAfter.After(chain[1].NotAfter) || chain[1].NotAfter.After(root.NotAfter) {
		err = errors.Join(err, fmt.Errorf("the leaf ends at %v, its intermediate at %v, the root at %v", chain[0].NotAfter, chain[1].NotAfter, root.NotAfter))
	}
	return err
}

func onlyRoot(bundle []*x509.Certificate, root *x509.Certificate) error {
	if len(bundle) != 1 || !bundle[0].Equal(root) {
		return fmt.Errorf("the bundle holds %d certificates, not the root alone", len(bundle))
	}
	return nil
}

// Where a root certifies the authorities, every door hands out leaf and intermediate to
// be verified by the root alone, and a whole rotation costs workloads no handshake.
func TestUpstreamAtWorkloads(t *testing.T) {
	t.Parallel()
	// It certifies for a short time more: intermediates and leaves end with it.
	root := peertest.NewAuthority(bankingDomain, peertest.TTL(98*time.Hour))
	c := catest.Start(t, catest.Options{Upstream: rootFiles(t, t.TempDir(), root.Cert, root.Key)})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: %d, path: %s, hosts: [h1]}}\n", os.Getuid(), exe))

	dir, err := os.MkdirTemp("", "up") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	at := func(name string) string { return filepath.Join(dir, name) }
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\nsettle: 20ms\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\nfiles:\n- {service: accounts, certificate: %s, key: %s, bundle: %s}\n",
		at("data"), c.AgentToken("h1", "dc1"), at("s"), at("cert.pem"), at("key.pem"), at("ca.pem"))))
	if err != nil {
		t.Fatal(err)
	}
	a, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	socket, err := workloaddoor.Listen(at("s"))
	if err != nil {
		t.Fatal(err)
	}
	api := workloaddoor.New(a, socket, nil)
	api.Beside(sds.New(a, cfg.SDS, workloaddoor.Caller, nil).Register)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- a.Run(ctx, meshagent.Door{Name: "workload API", Run: api.Run}, meshagent.Door{Name: "files", Run: files.New(a, nil).Run})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	eventually(t, "the agent is ready", 15*time.Second, a.Ready)

	// The Workload API, by go-spiffe.
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+at("s"))))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	current := func() *x509svid.SVID {
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	doors := func() error {
		if err := underRoot(current().Certificates, root.Cert); err != nil {
			return fmt.Errorf("the Workload API: %w", err)
		}
		bundle, err := source.GetX509BundleForTrustDomain(bankingDomain)
		if err == nil {
			err = onlyRoot(bundle.X509Authorities(), root.Cert)
		}
		if err != nil {
			return fmt.Errorf("the Workload API: %w", err)
		}
		// Envoy's SDS.
		conn, err := grpc.NewClient("unix://"+at("s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		response, err := secret.NewSecretDiscoveryServiceClient(conn).FetchSecrets(t.Context(), &discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}})
		if err != nil {
			return err
		}
		for _, packed := range response.GetResources() {
			s := &envoytls.Secret{}
			if err := packed.UnmarshalTo(s); err != nil {
				return err
			}
			if s.GetName() == "default" {
				err = underRoot(certificates(t, s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()), root.Cert)
			} else {
				validator := &envoytls.SPIFFECertValidatorConfig{}
				if err = s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(validator); err == nil {
					err = onlyRoot(certificates(t, validator.GetTrustDomains()[0].GetTrustBundle().GetInlineBytes()), root.Cert)
				}
			}
			if err != nil {
				return fmt.Errorf("SDS, %s: %w", s.GetName(), err)
			}
		}
		// Files.
		pair, err := tls.LoadX509KeyPair(at("cert.pem"), at("key.pem"))
		if err != nil {
			return err
		}
		text, err := os.ReadFile(at("ca.pem"))
		if err != nil {
			return err
		}
		var chain []*x509.Certificate
		for _, der := range pair.Certificate {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return err
			}
			chain = append(chain, cert)
		}
		if err := errors.Join(underRoot(chain, root.Cert), onlyRoot(certificates(t, text), root.Cert)); err != nil {
			return fmt.Errorf("files: %w", err)
		}
		return nil
	}
	eventually(t, "leaf, intermediate and root at every door", 10*time.Second, doors)

	// Workloads that verify each other by themselves, with a handshake for each call.
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(conn, conn); conn.Close() }()
		}
	}()
	call := func(own x509svid.Source) error {
		conn, err := (&tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: tlsconfig.MTLSClientConfig(own, source, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(bankingDomain, "/accounts")))}).DialContext(t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write([]byte("?")); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 1))
		return err
	}
	if err := call(source); err != nil {
		t.Fatalf("control: %v", err)
	}
	stranger := peertest.NewAuthority(bankingDomain)
	if err := call(stranger.Intermediate().Issue("/accounts")); err == nil {
		t.Error("a leaf under an intermediate of another root is accepted")
	}
	// Nor does the domain's own intermediate help a leaf that it did not sign.
	mixed := stranger.Issue("/accounts")
	mixed.Certificates = append(mixed.Certificates[:1:1], current().Certificates[1])
	if err := call(mixed); err == nil {
		t.Error("a leaf that the intermediate beside it did not sign is accepted")
	}

	calls, failed := 0, error(nil)
	stop, calling := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(calling)
		for failed == nil {
			select {
			case <-stop:
				return
			default:
				failed = call(source)
				calls++
			}
		}
	}()
	first := current()
	change := func(do func(context.Context, *ententev1.ChangeAuthorityRequest, ...grpc.CallOption) (*ententev1.ChangeAuthorityResponse, error), id string) {
		t.Helper()
		if _, err := do(t.Context(), &ententev1.ChangeAuthorityRequest{Id: id, Now: true}); err != nil {
			t.Fatal(err)
		}
	}
	old := inPhase(t, c, "ca-1", statev1.KeyUse_KEY_USE_X509, active).GetAuthority().GetId()
	next := waitReady(t, c, "ca-1", statev1.KeyUse_KEY_USE_X509).GetId()
	change(c.Admin().ActivateAuthority, next)
	change(c.Admin().TaintAuthority, old)
	eventually(t, "the workload's SVID is under the next intermediate", 10*time.Second, func() error {
		if ca.SignedUnder(current().Certificates[0]) != ca.AuthorityKeyID(next) {
			return errors.New("not yet")
		}
		return doors()
	})
	change(c.Admin().RevokeAuthority, old)
	eventually(t, "every door after the revocation", 10*time.Second, doors)
	close(stop)
	<-calling
	if failed != nil || calls < 2 {
		t.Errorf("during the rotation call %d failed: %v", calls, failed)
	}
	if first.Certificates[1].Equal(current().Certificates[1]) {
		t.Error("control: the intermediate is the one of before")
	}
}
