package files

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/internal/peer"
)

// A real nginx serves mTLS from the written files, and no request is lost while its
// certificate is renewed again and again under load.
func TestNginx(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		t.Skip("there is no nginx in PATH: apt-get install nginx-light, or apt-get download and dpkg -x, brings one")
	}
	c := catest.Start(t, catest.Options{})
	c.Apply(service("web", mine()+", ttl: {x509: 4s}") + service("client", mine()))
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	address := daemontest.FreeAddress(t)
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
daemon off;
worker_processes 2;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log;
events { worker_connections 256; }
http {
  access_log off;
  client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
  server {
    listen %[2]s ssl;
    ssl_protocols TLSv1.3;
    ssl_certificate %[1]s/web.pem;
    ssl_certificate_key %[1]s/web.key;
    ssl_client_certificate %[1]s/ca.pem;
    ssl_verify_client on;
    ssl_session_tickets off;
    location / { return 200 "$ssl_client_verify"; }
  }
}
`, dir, address), 0o644); err != nil {
		t.Fatal(err)
	}
	agent := start(t, c, fmt.Sprintf("- {service: web, certificate: %[1]s/web.pem, key: %[1]s/web.key, bundle: %[1]s/ca.pem, after: {signal: HUP, pidFile: %[1]s/nginx.pid}}\n", dir))
	eventually(t, func() error { _, err := os.Stat(dir + "/web.key"); return err })

	cmd := exec.Command(nginx, "-p", dir, "-c", config)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	})

	web := spiffeid.RequireFromString("spiffe://banking.example/web")
	client := func(config *tls.Config) *http.Client {
		return &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	}
	mutual := peer.ClientTLS(agent.SVIDs("service/client"), agent.Bundles(), peer.AnyOf(web))
	seen := map[string]bool{}
	var mu sync.Mutex
	get := func(cl *http.Client) error {
		answer, err := cl.Get("https://" + address + "/")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != 200 || string(text) != "SUCCESS" {
			return fmt.Errorf("%s %q %v", answer.Status, text, err)
		}
		mu.Lock()
		defer mu.Unlock()
		seen[answer.TLS.PeerCertificates[0].SerialNumber.String()] = true
		return nil
	}
	with := client(mutual)
	eventually(t, func() error { return get(with) })
	if err := get(client(peer.ClientTLS(nil, agent.Bundles(), peer.AnyOf(web)))); err == nil {
		t.Error("a client without a certificate was served")
	}

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var load sync.WaitGroup
	var requests, lost int
	for range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				err := get(with)
				mu.Lock()
				requests++
				if err != nil {
					lost++
					t.Error(err)
				}
				if len(seen) >= 4 || lost > 5 { // three renewals
					cancel()
				}
				mu.Unlock()
			}
		})
	}
	load.Wait()
	if len(seen) < 4 {
		t.Errorf("only %d certificates were seen", len(seen))
	}
	t.Logf("%d requests over %d certificates, %d lost", requests, len(seen), lost)
}
