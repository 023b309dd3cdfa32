package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/entente-mesh/entente/scenarios/process"
)

// errNoPeer: lines that are ratios have no value without a peer.
var errNoPeer = errors.New("no nginx here to compare with (Debian: apt-get install nginx)")

// nginxChain is the same way through four nginx processes: plain, mTLS three times, plain.
// Each verifies both ends as Entente's hops do, by TLS 1.3 with ECDSA P-256, and keeps its
// connections to the next.
type nginxChain struct {
	dir       string // of its files
	processes []*process.Process
	entry     string
	last      string // address of the last hop, for new connections
}

// nginxBinary finds nginx, also where an ordinary user's PATH does not look.
func nginxBinary() (string, error) {
	for _, name := range []string{"nginx", "/usr/sbin/nginx"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errNoPeer
}

// nginxPeer starts the chain in front of an application. The caller closes it.
func (b *bench) nginxPeer(ctx context.Context, app string) (c *nginxChain, err error) {
	binary, err := nginxBinary()
	if err != nil {
		return nil, err
	}
	b.domains++
	dir := filepath.Join(b.dir, fmt.Sprint(b.domains))
	if err := peerCertificates(dir); err != nil {
		return nil, err
	}
	const hops = 4
	at := func(hop int) string { return net.JoinHostPort(b.host, fmt.Sprint(10_000+b.domains*100+hop)) }
	c = &nginxChain{dir: dir, entry: at(0), last: at(hops - 1)}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	for hop := range hops {
		next := app
		if hop < hops-1 {
			next = at(hop + 1)
		}
		config := filepath.Join(dir, fmt.Sprintf("nginx-%d.conf", hop))
		if err := os.WriteFile(config, []byte(nginxConfig(dir, hop, hops, at(hop), next)), 0o600); err != nil {
			return c, err
		}
		p, err := b.processes.Start(process.Spec{
			Name: fmt.Sprintf("nginx %d", hop), Binary: binary, Args: []string{"-p", dir, "-c", config, "-e", "stderr"}, Log: filepath.Join(dir, fmt.Sprintf("nginx-%d.log", hop)),
		})
		if err != nil {
			return c, err
		}
		c.processes = append(c.processes, p)
		err = p.Ready(ctx, func(ctx context.Context) error {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", at(hop))
			if err == nil {
				conn.Close()
			}
			return err
		})
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c *nginxChain) close() {
	for _, p := range c.processes {
		end(p)
	}
}

// clientTLS is the configuration of a client of its hops.
func (c *nginxChain) clientTLS() (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(c.dir, "peer.crt"), filepath.Join(c.dir, "peer.key"))
	if err != nil {
		return nil, err
	}
	root, err := os.ReadFile(filepath.Join(c.dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	return &tls.Config{Certificates: []tls.Certificate{own}, ServerName: "peer.example", RootCAs: roots, CurvePreferences: []tls.CurveID{tls.X25519}}, nil
}

// nginxConfig is one hop's file: one worker, no log, nothing written to disk.
func nginxConfig(dir string, hop, hops int, listen, next string) string {
	user, in, scheme, out := "", "", "http", ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	tls := func(prefix string) string {
		return fmt.Sprintf("%[1]scertificate %[2]s/peer.crt; %[1]scertificate_key %[2]s/peer.key; %[1]sprotocols TLSv1.3;\n", prefix, dir)
	}
	if hop > 0 {
		in = tls("ssl_") + fmt.Sprintf("ssl_client_certificate %s/ca.crt; ssl_verify_client on; ssl_session_cache off; ssl_session_tickets off;\n", dir)
		listen += " ssl"
	}
	if hop < hops-1 {
		scheme = "https"
		out = tls("proxy_ssl_") + fmt.Sprintf("proxy_ssl_trusted_certificate %s/ca.crt; proxy_ssl_verify on; proxy_ssl_name peer.example; proxy_ssl_session_reuse off;\n", dir)
	}
	temporary := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temporary += fmt.Sprintf("%s_temp_path %s/%d-%s;\n", kind, dir, hop, kind)
	}
	return fmt.Sprintf(`%sdaemon off; master_process off; pid %s/%d.pid;
events { worker_connections 4096; }
http {
access_log off; keepalive_requests 100000000; keepalive_timeout 1h;
%supstream next { server %s; keepalive 128; keepalive_requests 100000000; }
server {
listen %s;
%slocation / {
proxy_pass %s://next; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; proxy_max_temp_file_size 0;
%s}
}
}
`, user, dir, hop, temporary, next, listen, in, scheme, out)
}

// peerCertificates writes a root, and one certificate that all hops have.
func peerCertificates(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	root, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	until := time.Now().Add(24 * time.Hour)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "peer"}, NotAfter: until, DNSNames: []string{"peer.example"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	write := func(name, kind string, der []byte) error {
		return os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, ca, ca, root.Public(), root)
	if err != nil {
		return err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), root)
	if err != nil {
		return err
	}
	return errors.Join(write("ca.crt", "CERTIFICATE", rootDER), write("peer.crt", "CERTIFICATE", leafDER), write("peer.key", "PRIVATE KEY", private))
}
