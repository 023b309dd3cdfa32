package node_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
)

const accountsOnH1 = "apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts, owner: team}\nspec: {run: {uid: 1000, hosts: [h1]}}\n"

// webCertificate writes a self-signed certificate and its key, and returns a client
// that trusts it.
func webCertificate(t *testing.T, dir string) (cert *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "oidc"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"web.pem": {Type: "CERTIFICATE", Bytes: der}, "web.key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err = x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func get(t *testing.T, roots *x509.CertPool, url, tag string) (*http.Response, []byte) {
	t.Helper()
	config := &tls.Config{RootCAs: roots, InsecureSkipVerify: roots == nil}
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if tag != "" {
		req.Header.Set("If-None-Match", tag)
	}
	resp, err := web.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

// A verifier that knows OpenID Connect and not SPIFFE verifies a JWT-SVID by discovery
// alone, with ES256 keys and with RS256 keys; a renewed certificate is served without a
// restart.
func TestOIDC(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"", "RS256"} {
		t.Run("alg "+alg, func(t *testing.T) {
			t.Parallel()
			c := catest.Prepare(t, catest.Options{})
			dir := t.TempDir()
			cert := webCertificate(t, dir)
			address := daemontest.FreeAddress(t)
			issuer := "https://" + address + "/banking"
			cfg := c.Config()
			cfg.Keys.JWT = alg
			cfg.OIDC = node.OIDC{Issuer: issuer, Listen: address, CertFile: filepath.Join(dir, "web.pem"), KeyFile: filepath.Join(dir, "web.key")}
			if err := node.Init(cfg, func(string) error { return nil }); err != nil {
				t.Fatal(err)
			}
			c.Restart()
			c.WaitReady()
			c.Apply(accountsOnH1)
			token := attest(t, c, "h1").at(t, c).SignJWT(t.Context(), []client.JWTRequest{{EntryID: "service/accounts", Audience: []string{"sts.example"}}})[0]
			if token.Err != nil {
				t.Fatal(token.Err)
			}

			roots := x509.NewCertPool()
			roots.AddCert(cert)
			resp, body := get(t, roots, issuer+"/.well-known/openid-configuration", "")
			var discovery struct {
				Issuer string   `json:"issuer"`
				Keys   string   `json:"jwks_uri"`
				Algs   []string `json:"id_token_signing_alg_values_supported"`
			}
			if err := json.Unmarshal(body, &discovery); err != nil || resp.StatusCode != 200 || discovery.Issuer != issuer || len(discovery.Algs) != 2 {
				t.Fatalf("%d %s %v", resp.StatusCode, body, err)
			}
			resp, body = get(t, roots, discovery.Keys, "")
			var keys jose.JSONWebKeySet
			if err := json.Unmarshal(body, &keys); err != nil || len(keys.Keys) != 2 {
				t.Fatalf("%s %v", body, err)
			}
			if tag := resp.Header.Get("ETag"); tag == "" || resp.Header.Get("Cache-Control") == "" {
				t.Error("it cannot be cached")
			} else if again, _ := get(t, roots, discovery.Keys, tag); again.StatusCode != http.StatusNotModified {
				t.Errorf("conditional: %d", again.StatusCode)
			}
			want := jose.ES256
			if alg != "" {
				want = jose.RS256
			}
			parsed, err := jwt.ParseSigned(token.Token.Reveal(), []jose.SignatureAlgorithm{want})
			if err != nil {
				t.Fatal(err)
			}
			key := keys.Key(parsed.Headers[0].KeyID)
			if len(key) != 1 || key[0].Use != "sig" || key[0].Algorithm != string(want) {
				t.Fatalf("key %+v", key)
			}
			var claims jwt.Claims
			if err := parsed.Claims(key[0].Key, &claims); err != nil {
				t.Fatal(err)
			}
			if err := claims.Validate(jwt.Expected{Issuer: issuer, AnyAudience: jwt.Audience{"sts.example"}, Time: time.Now()}); err != nil || claims.Subject != "spiffe://banking.example/accounts" {
				t.Errorf("%+v %v", claims, err)
			}

			// The certificate is renewed; in between, its files do not fit together.
			if alg == "" {
				if err := os.WriteFile(filepath.Join(dir, "web.key"), []byte("half"), 0o600); err != nil {
					t.Fatal(err)
				}
				time.Sleep(1100 * time.Millisecond)
				get(t, roots, discovery.Keys, "")
				next := x509.NewCertPool()
				next.AddCert(webCertificate(t, dir))
				time.Sleep(1100 * time.Millisecond)
				get(t, next, discovery.Keys, "")
			}
		})
	}
}

// Token authorities rotate like the X.509 ones, each of its own: the next is in the
// bundle before it signs, the one before stays as long as what it signed.
// Requirements: 114.
func TestTokenAuthoritiesRotate(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{Phase: 3 * time.Second, X509SVID: 2 * time.Second, JWTSVID: 2 * time.Second, WITSVID: 2 * time.Second}})
	active := func() map[statev1.KeyUse]*statev1.Authority {
		all := map[statev1.KeyUse]*statev1.Authority{}
		for _, a := range c.Status().GetAuthorities() {
			if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE {
				all[a.GetUse()] = a
			}
		}
		return all
	}
	first := active()
	eventually(t, "all three have rotated", 15*time.Second, func() error {
		now := active()
		for use, before := range first {
			after := now[use]
			if after == nil || after.GetId() == before.GetId() {
				return fmt.Errorf("%s: not yet", use)
			}
			if !after.GetReady() || after.GetPreparedRevision() == 0 {
				return fmt.Errorf("%s: active and not ready", use)
			}
		}
		if len(now) != 3 {
			return errors.New("not three uses")
		}
		return nil
	})
	b, _, err := bundle.Parse(c.TrustDomain(), c.BundleJSON())
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, key := range b.JWT {
		ids[key.ID] = true
	}
	if !ids[active()[statev1.KeyUse_KEY_USE_JWT].GetId()] {
		t.Error("the active JWT key is not in the bundle")
	}
}

// What is held of a bundle may be less than what its domain serves: without the WIT keys
// that nobody asked for. A node that starts anew with that does not take the same bundle
// for another of the same sequence.
// Requirements: 119.
func TestTrimmedBundleIsTheSame(t *testing.T) {
	t.Parallel()
	banking := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	relate := func(from, to *catest.CA, url string, wit bool) {
		t.Helper()
		_, err := from.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{
			Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
				TrustDomain: to.TrustDomain().Name(), EndpointUrls: []string{url}, EndpointId: to.BundleID().String(),
				BootstrapBundle: to.BundleJSON(), Wit: wit,
			}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	relate(banking, trading, trading.BundleURL(), true) // so that there is a variant with WIT keys
	relate(trading, banking, banking.BundleURL()+"wit", false)
	fetched := func(sequence uint64) func() error {
		return func() error {
			for _, f := range trading.Status().GetForeign() {
				switch {
				case f.GetError() != "":
					return errors.New(f.GetError())
				case f.GetAgeSeconds() < 0 || f.GetSequence() < sequence:
					return fmt.Errorf("fetched %v s ago, sequence %d", f.GetAgeSeconds(), f.GetSequence())
				default:
					return nil
				}
			}
			return errors.New("no foreign bundle")
		}
	}
	resp, err := banking.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{Wit: true})
	if err != nil {
		t.Fatal(err)
	}
	variant, _, err := bundle.Parse(banking.TrustDomain(), resp.GetJwks())
	if err != nil || len(variant.WIT) == 0 {
		t.Fatalf("control: %d WIT keys, %v", len(variant.WIT), err)
	}
	eventually(t, "trading has fetched the variant", 10*time.Second, fetched(variant.Sequence))
	trading.Stop()
	trading.Restart()
	trading.WaitReady()
	eventually(t, "trading has fetched it again", 10*time.Second, fetched(variant.Sequence))
}

// WIT keys are at the endpoint only while a relationship asks for them, and a domain
// takes them only for a relationship that does.
// Requirements: T16.
func TestWITVariant(t *testing.T) {
	t.Parallel()
	banking := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	relate := func(from, to *catest.CA, url string, wit bool) {
		t.Helper()
		_, err := from.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{
			Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
				TrustDomain: to.TrustDomain().Name(), EndpointUrls: []string{url}, EndpointId: to.BundleID().String(),
				BootstrapBundle: to.BundleJSON(), Wit: wit,
			}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	wits := func(c *catest.CA, of string) (int, error) {
		resp, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{TrustDomain: of})
		if err != nil {
			return 0, err
		}
		b, _, err := bundle.Parse(banking.TrustDomain(), resp.GetJwks())
		if err != nil || len(b.JWT) == 0 {
			return 0, fmt.Errorf("%d JWT keys, %v", len(b.JWT), err)
		}
		return len(b.WIT), nil
	}
	variant := banking.BundleURL() + "wit"
	if resp, _ := get(t, nil, variant, ""); resp.StatusCode != http.StatusNotFound {
		t.Errorf("nobody asked, and the variant is served: %d", resp.StatusCode)
	}
	relate(banking, trading, trading.BundleURL(), true)
	eventually(t, "the variant is served", 5*time.Second, func() error {
		if resp, _ := get(t, nil, variant, ""); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%d", resp.StatusCode)
		}
		return nil
	})
	// Control: the plain endpoint, and a relationship that does not take them.
	relate(trading, banking, banking.BundleURL(), false)
	eventually(t, "trading holds banking's bundle", 10*time.Second, func() error {
		n, err := wits(trading, "banking.example")
		if err == nil && n != 0 {
			t.Fatalf("%d WIT keys that nobody asked for", n)
		}
		return err
	})
	relate(trading, banking, variant, true)
	eventually(t, "trading holds banking's WIT keys", 10*time.Second, func() error {
		n, err := wits(trading, "banking.example")
		if err == nil && n != 2 {
			err = fmt.Errorf("%d WIT keys", n)
		}
		return err
	})
}
